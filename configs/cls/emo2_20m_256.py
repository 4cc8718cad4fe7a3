# EMOv2-20M on ImageNet-1K at 256, with windows of 8: no result is published.
_base_ = './emo2_5m_256.py'

model = dict(
    backbone=dict(arch='20m', drop_path_rate=0.1),
    head=dict(in_channels=448),
)
