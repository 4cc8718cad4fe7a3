# EMOv2-50M on ImageNet-1K at 224: no result is published as a table row.
_base_ = './emo2_5m.py'

model = dict(
    backbone=dict(arch='50m', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
