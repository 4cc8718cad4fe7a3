"""faster-coco-eval gives the figures of pycocotools."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest

from emo2_mm.datasets.coco_eval import cocoeval_class, faster_evaluation

pytest.importorskip('pycocotools')
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


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


@pytest.mark.parametrize('limits', [[1, 10, 100], [100, 300, 1000]], ids=['coco', 'mmdet'])
@pytest.mark.parametrize('iou', ['bbox', 'segm'])
def test_figures_are_the_same(iou: str, limits: list[int]) -> None:
    faster = pytest.importorskip('faster_coco_eval').COCOeval_faster
    assert issubclass(cocoeval_class(), faster)
    for seed in range(3):
        truth, found = made_up(seed)
        a, b = (figures(kind, truth, found, iou, limits) for kind in (COCOeval, faster))
        assert a[1][1] > 0.1
        for x, y in zip(a, b):
            np.testing.assert_allclose(y, x, atol=1e-6)


def test_mmdet_evaluates_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = pytest.importorskip('mmdet.evaluation.metrics.coco_metric')
    before = metric.COCOeval
    with faster_evaluation():
        assert metric.COCOeval.__name__ == cocoeval_class().__name__
    assert metric.COCOeval is before


def test_pycocotools_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    assert cocoeval_class() is COCOeval


def test_table_is_printed(capsys: pytest.CaptureFixture) -> None:
    truth, found = made_up(0)
    figures(cocoeval_class(), truth, found, 'bbox', [1, 10, 100])
    said = capsys.readouterr().out
    assert said.count('Average Precision') == said.count('Average Recall') == 6
