# SegFormer on EMOv2-2M, ADE20K: reported mIoU 40.2.
_base_ = './segformer_emo2_5m.py'

checkpoint = 'checkpoints/EMOv2_2M_224.pth'
model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[32, 48, 120, 200]),
)
