# EMOv2-1M learns handwritten digits at 48 pixels, on a CPU. Data: tools/demo/make_digits.py.
_base_ = '../cls/emo2_1m.py'

model = dict(
    # at 48 pixels the attending stages see 3 x 3 and 2 x 2 tokens
    backbone=dict(window_size=3, drop_path_rate=0.0, layer_scale_init_value=0.1),
    head=dict(num_classes=10),
)

data_preprocessor = dict(num_classes=10)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=48, crop_ratio_range=(0.7, 1.0), backend='pillow'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(_delete_=True, type='CustomDataset', data_root='data/digits/folders')
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(data_prefix='val', pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader

epochs = 4  # of 90 steps
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        eta_min=4e-5,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [dict(type='EMAHook', momentum=0.05, priority='ABOVE_NORMAL')]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(logger=dict(interval=10))
randomness = dict(seed=0)
