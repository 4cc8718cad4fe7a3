# PSPNet on EMOv2-5M, ADE20K: reported mIoU 39.1. The root of the PSPNet configs; only the head is not
# DeepLabv3's.
_base_ = './deeplabv3_emo2_5m.py'

model = dict(
    decode_head=dict(
        _delete_=True,
        type='PSPHead',
        in_channels=288,
        in_index=3,
        channels=256,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
