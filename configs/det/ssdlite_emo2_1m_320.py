# SSDLite on EMOv2-1M at 320 x 320, COCO: reported box mAP 22.3.
_base_ = './ssdlite_emo2_5m_320.py'

checkpoint = 'checkpoints/EMOv2_1M_224.pth'
model = dict(
    backbone=dict(arch='1m', drop_path_rate=0.04036, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=(80, 180), out_channels=(80, 180, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(80, 180, 512, 256, 256, 128)),
)
