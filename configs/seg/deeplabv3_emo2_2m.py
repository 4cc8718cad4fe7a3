# DeepLabv3 on EMOv2-2M, ADE20K: reported mIoU 36.8.
_base_ = './deeplabv3_emo2_5m.py'

checkpoint = 'checkpoints/EMOv2_2M_224.pth'
model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=200),
    auxiliary_head=dict(in_channels=120),
)
