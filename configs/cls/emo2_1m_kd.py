# EMOv2-1M on ImageNet-1K at 224, which also learns from TResNet-L v2: reported top-1 73.5.
_base_ = './emo2_5m_kd.py'

model = dict(
    backbone=dict(arch='1m', drop_path_rate=0.04036),
    head=dict(in_channels=180),
)
