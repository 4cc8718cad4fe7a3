"""faster-coco-eval gives the figures of pycocotools."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from emo2_mm.datasets.coco_eval import cocoeval_class, faster_evaluation

pytest.importorskip('pycocotools')
from helpers.coco_results import figures, made_up  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402


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
