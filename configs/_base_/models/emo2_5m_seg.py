# What the segmentors on EMOv2-5M share.
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type='emo2_mm.EMOv2',
        arch='5m',
        window_size=10,
        drop_path_rate=0.05,
        out_indices=(0, 1, 2, 3),
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/EMOv2_5M_224.pth'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
