# Mask R-CNN on EMOv2 for your own data; docs/guide/custom_datasets.md has the options:
#   python tools/train.py configs/det/mask-rcnn_emo2_custom.py --cfg-options data_root=PATH arch=2m
_base_ = ['./mask-rcnn_emo2_1m.py', '../_base_/custom_options.py']

data_format = 'coco'
light_head = None  # fewer channels in neck and head: as a default for 1m and 2m

model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False)
)  # unlike COCO, own data may be far from ImageNet
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=10.0))
auto_scale_lr = dict(base_batch_size=4)  # of the learning rate
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=None),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, begin=0, end=None, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=None, val_interval=1)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best='coco/bbox_mAP'))
custom_hooks = [dict(type='emo2_mm.analysis.results.ResultsHook')]  # pictures of the results in the work dir
