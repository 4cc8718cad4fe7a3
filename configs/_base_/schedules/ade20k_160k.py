# 160,000 iterations of AdamW, 1.2e-4 for a total batch of 32, ten times that in the heads.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # a custom key puts the other rules aside, so the norms of the heads have one, too
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={'head': dict(lr_mult=10.0), '.bn.': dict(lr_mult=10.0, decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=False,
        begin=80000,
        end=160000,
        T_max=80000,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=32, enable=False)
