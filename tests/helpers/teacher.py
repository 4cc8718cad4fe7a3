"""A small teacher with weights in a file, in place of one that would be downloaded, and its student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from emo2_mm.distill import DistilledImageClassifier

from .tiny import SIDE

CLASSES = 6
ARCH = dict(depths=(1, 1, 2, 2), channels=(8, 12, 16, 24), expand_ratios=(2, 2, 2, 2), head_dim=8)


def classifier(num_classes: int, **backbone: Any) -> dict[str, Any]:
    """Config of a tiny plain classifier whose attention and residual branches are visible."""
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        backbone=dict(
            type='emo2_mm.EMOv2',
            arch=ARCH,
            window_size=4,
            layer_scale_init_value=0.5,
            out_indices=(3,),
            final_norm=True,
            **backbone,
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead',
            num_classes=num_classes,
            in_channels=24,
            loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
            topk=(1,),
            init_cfg=dict(type='Normal', layer='Linear', std=0.5),
        ),
    )


def write_teacher(folder: Path, num_classes: int) -> dict[str, Any]:
    """Config of a teacher; its random weights are written into the folder."""
    torch.manual_seed(1)
    network = MODELS.build(classifier(num_classes))
    network.init_weights()
    torch.save(network.state_dict(), folder / 'teacher.pth')
    return dict(classifier(num_classes), pretrained=str(folder / 'teacher.pth'))


def build(teacher: dict[str, Any], size: int = SIDE, **kwargs: Any) -> DistilledImageClassifier:
    """A tiny student with visible branches, and its teacher."""
    torch.manual_seed(0)
    student = dict(classifier(CLASSES), type='emo2_mm.distill.DistilledImageClassifier')
    model = MODELS.build(dict(student, teacher=teacher, teacher_size=size, **kwargs))
    model.init_weights()
    return model


def batch(images: int = 4, side: int = SIDE) -> dict[str, Any]:
    """What a data loader gives: images of 0..255 and their labels."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    return dict(inputs=inputs, data_samples=[DataSample().set_gt_label(i % CLASSES) for i in range(images)])


def losses_of(model: DistilledImageClassifier, data: dict[str, Any]) -> dict[str, Tensor]:
    return model(**model.data_preprocessor(data, training=True), mode='loss')
