# SSDLite on EMOv2-20M at 320 x 320, COCO: reported box mAP 33.1. No ImageNet weights of 20M are released, so
# this starts from random ones and trains all norms. With weights of your own, set
# `init_cfg=dict(type='Pretrained', checkpoint=FILE), norm_eval=True` as published.
_base_ = './ssdlite_emo2_5m_320.py'

model = dict(
    backbone=dict(arch='20m', drop_path_rate=0.1, init_cfg=None, norm_eval=False),
    neck=dict(in_channels=(320, 448), out_channels=(320, 448, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(320, 448, 512, 256, 256, 128)),
)
