# EMOv2-5M on ImageNet-1K at 224, which also learns from TResNet-L v2: reported top-1 80.9. The root of all
# distilled configs. Training needs timm and, once, 0.2 GB of the teacher's weights; testing needs neither.
# Another teacher: teacher=dict(_delete_=True, ...), any classifier of MMPretrain with its data_preprocessor.
_base_ = './emo2_5m.py'

model = dict(
    type='emo2_mm.distill.DistilledImageClassifier',
    teacher=dict(
        type='TimmClassifier',
        model_name='tresnet_v2_l.miil_in21k_ft_in1k',
        pretrained=True,
        data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True),  # it takes 0..1
    ),
    teacher_size=224,
    distill_weight=5.0,
)
