# DeepLabv3 on EMOv2-5M, ADE20K: reported mIoU 39.8. The root of the DeepLabv3 configs.
_base_ = [
    '../_base_/models/emo2_5m_seg.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/ade20k_80k.py',
    '../_base_/seg_runtime.py',
]

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    decode_head=dict(
        type='ASPPHead',
        in_channels=288,
        in_index=3,
        channels=256,
        dilations=(1, 12, 24, 36),
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=160,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
)
