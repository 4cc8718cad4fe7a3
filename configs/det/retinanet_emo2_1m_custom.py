# RetinaNet on EMOv2-1M for own data, which docs/own_data.md describes:  --cfg-options data_root=PATH
_base_ = './retinanet_emo2_1m.py'

data_format = 'coco'
data_root = None
max_epochs = None  # by the number of images

train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=8)
