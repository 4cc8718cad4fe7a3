# Semantic FPN on EMOv2-1M, ADE20K: reported mIoU 37.1.
_base_ = './fpn_emo2_5m.py'

checkpoint = 'checkpoints/EMOv2_1M_224.pth'
model = dict(
    backbone=dict(arch='1m', drop_path_rate=0.04036, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[32, 48, 80, 180]),
)
