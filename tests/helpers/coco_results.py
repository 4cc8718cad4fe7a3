"""Made-up ground truth and detections in COCO's format, and their evaluation. Needs pycocotools."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO


def made_up(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth with crowds and masks, and detections near it or anywhere, of forty images."""
    rng = np.random.RandomState(seed)
    truth: dict[str, Any] = {'images': [], 'annotations': [], 'categories': [{'id': i + 1} for i in range(3)]}
    found = []

    def rle(box: np.ndarray) -> dict[str, Any]:
        pixels = np.zeros((200, 300), np.uint8, order='F')
        left, top, width, height = box.astype(int)
        pixels[top : top + height, left : left + width] = 1
        return masks.encode(pixels)

    for image in range(40):
        truth['images'].append(dict(id=image + 1, width=300, height=200))
        for _ in range(rng.randint(0, 8)):
            box = np.concatenate([rng.uniform(0, 150, 2), rng.uniform(2, 120, 2)])
            entry = dict(image_id=image + 1, category_id=int(rng.randint(3)) + 1, bbox=box.tolist())
            crowd = int(rng.rand() < 0.1)
            number = len(truth['annotations']) + 1
            more = dict(id=number, iscrowd=crowd, area=float(box[2] * box[3]), segmentation=rle(box))
            truth['annotations'].append({**entry, **more})
            for _ in range(rng.randint(0, 4)):
                near = np.clip(box + rng.normal(0, 6, 4), 1, 190)
                found.append(dict(entry, bbox=near.tolist(), score=float(rng.rand()), segmentation=rle(near)))
    return truth, found


def figures(
    kind: Any, truth: dict, found: list, iou: str, limits: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Precisions and summary, set up as MMDetection does."""
    api = COCO()
    api.dataset = copy.deepcopy(truth)
    api.createIndex()
    found = copy.deepcopy(found)
    if iou == 'segm':
        for x in found:
            x.pop('bbox')
    evaluation = kind(api, api.loadRes(found), iou)
    evaluation.params.catIds = [1, 2, 3]
    evaluation.params.imgIds = sorted(api.imgs)
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.asarray(evaluation.eval['precision']), np.asarray(evaluation.stats)[:12]
