# EMOv2-1M for own data, which docs/own_data.md describes:  --cfg-options data_root=PATH
_base_ = './emo2_1m.py'

data_format = 'folders'
data_root = None
max_epochs = None  # by the number of images

checkpoint = 'checkpoints/EMOv2_1M_224.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
custom_hooks = []  # a moving average of 5,000 steps would lag behind a short training
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
auto_scale_lr = dict(base_batch_size=64)
