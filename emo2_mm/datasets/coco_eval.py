"""COCO's evaluation by faster-coco-eval where it is installed, else by pycocotools: the same figures."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Any, Iterator


def cocoeval_class() -> Any:
    """The class that evaluates, with pycocotools' interface.

    Returns:
        A ``faster_coco_eval.COCOeval_faster``, several times as fast, or ``pycocotools.cocoeval.COCOeval``.
    """
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        from pycocotools.cocoeval import COCOeval

        return COCOeval

    class PrintingCOCOeval(COCOeval_faster):
        """Prints the twelve figures of pycocotools; the original logs them, and two more recalls."""

        def summarize(self) -> None:
            self.print_function = _print_figure
            super().summarize()

    return PrintingCOCOeval


def _print_figure(line: str) -> None:
    if not re.search(r'Average Recall .*IoU=\d\.\d\d ', line):  # at one threshold
        print(line)


@contextmanager
def faster_evaluation() -> Iterator[None]:
    """Let MMDetection's ``CocoMetric``, which takes it from its module, use :func:`cocoeval_class`."""
    from mmdet.evaluation.metrics import coco_metric

    before = coco_metric.COCOeval
    coco_metric.COCOeval = cocoeval_class()
    try:
        yield
    finally:
        coco_metric.COCOeval = before
