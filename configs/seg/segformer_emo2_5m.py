# SegFormer on EMOv2-5M, ADE20K: reported mIoU 43.0. The root of the SegFormer configs.
_base_ = [
    '../_base_/models/emo2_5m_seg.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/seg_runtime.py',
]

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    decode_head=dict(
        type='SegformerHead',
        in_channels=[48, 72, 160, 288],
        in_index=[0, 1, 2, 3],
        channels=288,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
