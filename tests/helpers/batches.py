"""Batches of images and what is known of them, for each of the three libraries."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.structures import InstanceData, PixelData


def make_batch(scope: str, images: int, side: int = 64) -> dict[str, Any]:
    """What the data loader of a library gives: images of random pixels with boxes, maps or classes.

    There are as many boxes in each image, for a detector divides its loss by their number.
    """
    torch.manual_seed(1)
    info = dict(
        img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side), scale_factor=(1.0, 1.0)
    )
    samples = []
    for i in range(images):
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample

            boxes = torch.tensor([[4.0, 6, 40, 42], [20, 12, 60, 60]])
            sample = DetDataSample(metainfo=info)
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([i % 2, 1]))
        elif scope == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=info)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, side, side)))
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=info).set_gt_label(i % 2)
        samples.append(sample)
    pixels = [torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in samples]
    if scope == 'mmpretrain':
        return dict(inputs=torch.stack(pixels), data_samples=samples)
    return dict(inputs=pixels, data_samples=samples)
