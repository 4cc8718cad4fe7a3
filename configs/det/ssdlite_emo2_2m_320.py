# SSDLite on EMOv2-2M at 320 x 320, COCO: reported box mAP 26.0.
_base_ = './ssdlite_emo2_5m_320.py'

checkpoint = 'checkpoints/EMOv2_2M_224.pth'
model = dict(
    backbone=dict(arch='2m', drop_path_rate=0.05, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=(120, 200), out_channels=(120, 200, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(120, 200, 512, 256, 256, 128)),
)
