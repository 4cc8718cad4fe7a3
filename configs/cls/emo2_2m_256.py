# EMOv2-2M on ImageNet-1K at 256, with windows of 8: no result is published.
_base_ = './emo2_5m_256.py'

model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05),
    head=dict(in_channels=200),
)
