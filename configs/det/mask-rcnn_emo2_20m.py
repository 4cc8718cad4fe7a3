# Mask R-CNN on EMOv2-20M, COCO 1x: reported box mAP 44.2. No ImageNet weights of 20M are released, so
# this starts from random ones and freezes nothing. With weights of your own, set
# `init_cfg=dict(type='Pretrained', checkpoint=FILE), frozen_stages=1, norm_eval=True` as published.
_base_ = './mask-rcnn_emo2_5m.py'

model = dict(
    backbone=dict(arch='20m', drop_path_rate=0.1, init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[64, 128, 320, 448]),
)
