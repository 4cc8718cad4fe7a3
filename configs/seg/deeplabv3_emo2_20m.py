# DeepLabv3 on EMOv2-20M, ADE20K: reported mIoU 43.3. No ImageNet weights of 20M are
# released, so this starts from random ones; name your own with
# `init_cfg=dict(type='Pretrained', checkpoint=FILE)`.
_base_ = './deeplabv3_emo2_5m.py'

model = dict(
    backbone=dict(arch='20m', drop_path_rate=0.1, init_cfg=None),
    decode_head=dict(in_channels=448),
    auxiliary_head=dict(in_channels=320),
)
