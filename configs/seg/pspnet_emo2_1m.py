# PSPNet on EMOv2-1M, ADE20K: reported mIoU 33.6.
_base_ = './pspnet_emo2_5m.py'

checkpoint = 'checkpoints/EMOv2_1M_224.pth'
model = dict(
    backbone=dict(arch='1m', drop_path_rate=0.04036, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=180),
    auxiliary_head=dict(in_channels=80),
)
