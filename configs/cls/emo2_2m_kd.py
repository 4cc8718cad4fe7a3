# EMOv2-2M on ImageNet-1K at 224, which also learns from TResNet-L v2: reported top-1 76.7.
_base_ = './emo2_5m_kd.py'

model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05),
    head=dict(in_channels=200),
)
