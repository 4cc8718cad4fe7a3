# RetinaNet on EMOv2-1M finds handwritten digits at 192 pixels, on a CPU. Data: tools/demo/make_digits.py.
_base_ = '../det/retinanet_emo2_1m.py'

model = dict(
    backbone=dict(
        window_size=6,
        drop_path_rate=0.0,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(checkpoint='work_dirs/demo/classify/epoch_4.pth'),
    ),
    neck=dict(out_channels=96, num_outs=4),
    bbox_head=dict(
        num_classes=10,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        anchor_generator=dict(strides=[8, 16, 32, 64]),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (192, 192)
dataset = dict(
    data_root='data/digits/coco/',
    metainfo=dict(classes=tuple('0123456789')),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(min_size=0),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/digits/coco/annotations/val.json')
test_evaluator = val_evaluator

epochs = 3  # of 300 steps
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=2e-5,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=epochs)
tta_pipeline = None  # its sizes are those of COCO
default_hooks = dict(logger=dict(interval=10))
randomness = dict(seed=0)
