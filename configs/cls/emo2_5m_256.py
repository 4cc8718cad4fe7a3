# EMOv2-5M on ImageNet-1K at 256, with windows of 8: no result is published. The root of the configs at 256.
_base_ = './emo2_5m.py'

model = dict(backbone=dict(window_size=8))
_base_.train_dataloader.dataset.pipeline[1].transforms[0][0].scale = 256
_base_.train_dataloader.dataset.pipeline[1].transforms[1][0].scale = 256
_base_.val_dataloader.dataset.pipeline[1].scale = 292  # 256 / 0.875
_base_.val_dataloader.dataset.pipeline[2].crop_size = 256
_base_.test_dataloader.dataset.pipeline[1].scale = 292
_base_.test_dataloader.dataset.pipeline[2].crop_size = 256
