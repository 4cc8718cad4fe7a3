# SSDLite on EMOv2-1M (320) for own data, which docs/own_data.md describes: --cfg-options data_root=PATH
_base_ = './ssdlite_emo2_1m_320.py'

data_format = 'coco'
data_root = None
max_epochs = None  # by the number of images

train_dataloader = dict(batch_size=16)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=16)
