# SSDLite on EMOv2-5M at 512 x 512, COCO: reported box mAP 34.8.
_base_ = './ssdlite_emo2_5m_320.py'

_base_.train_dataloader.dataset.dataset.pipeline[4].scale = (512, 512)
_base_.val_dataloader.dataset.pipeline[1].scale = (512, 512)
_base_.test_dataloader.dataset.pipeline[1].scale = (512, 512)
