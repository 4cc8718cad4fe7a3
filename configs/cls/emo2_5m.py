# EMOv2-5M on ImageNet-1K at 224: reported top-1 79.4. The root of all classification configs.
_base_ = [
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/cls_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='emo2_mm.EMOv2',
        arch='5m',
        window_size=7,
        drop_path_rate=0.05,
        out_indices=(3,),
        final_norm=True,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=288,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
)
