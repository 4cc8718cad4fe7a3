# Semantic FPN on EMOv2-2M, ADE20K: reported mIoU 39.9.
_base_ = './fpn_emo2_5m.py'

checkpoint = 'checkpoints/EMOv2_2M_224.pth'
model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[32, 48, 120, 200]),
)
