"""A small teacher with weights in a file, to stand in for one that would have to be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmpretrain.registry import MODELS

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
