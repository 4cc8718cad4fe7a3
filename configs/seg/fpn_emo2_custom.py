# Semantic FPN on EMOv2 for your own data; docs/guide/custom_datasets.md has the options:
#   python tools/train.py configs/seg/fpn_emo2_custom.py --cfg-options data_root=PATH arch=2m
_base_ = ['./fpn_emo2_1m.py', '../_base_/custom_options.py']

data_format = 'maps'

train_dataloader = dict(
    batch_size=8, drop_last=True, sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True)
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=8)  # of the learning rate
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=None),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, begin=0, end=None, convert_to_iter_based=True),
]
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=None, val_interval=1)
default_hooks = dict(
    checkpoint=dict(by_epoch=True, interval=1, save_best='mIoU'),
    logger=dict(interval=10, log_metric_by_epoch=True),
)
custom_hooks = [dict(type='emo2_mm.analysis.results.ResultsHook')]  # pictures of the results in the work dir
log_processor = dict(by_epoch=True)
