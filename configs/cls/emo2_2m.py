# EMOv2-2M on ImageNet-1K at 224: reported top-1 75.8.
_base_ = './emo2_5m.py'

model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05),
    head=dict(in_channels=200),
)
