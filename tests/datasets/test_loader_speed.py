"""The throughput of a data loader counts the images that it gave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, run, write_config, write_data
from mmengine.config import Config

from emo2_mm.datasets import loader_speed


@pytest.mark.parametrize('text', [CLASSIFIER, DETECTOR, SEGMENTOR], ids=['cls', 'det', 'seg'])
def test_images_of_several_epochs_are_counted_without_the_first_batch(
    tmp_path: Any, monkeypatch: Any, text: str
) -> None:
    """A second a batch: the first is not counted, then five batches of two, over epochs of two."""
    cfg = Config.fromfile(write_config(tmp_path, text))
    pytest.importorskip(cfg.default_scope)
    write_data(tmp_path)
    cfg.train_dataloader.setdefault('collate_fn', dict(type='pseudo_collate'))
    clock = iter(range(100))
    monkeypatch.setattr(loader_speed, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    assert loader_speed.measure(cfg, seconds=4.5) == loader_speed.Rate(images=10, seconds=5, start=1)


@pytest.mark.slow
def test_the_tool_prints_the_rate(tmp_path: Any) -> None:
    pytest.importorskip('mmdet')
    write_data(tmp_path)
    done = run(tmp_path, 'benchmark_dataloader.py', write_config(tmp_path, DETECTOR), '--seconds', 0.1)
    assert done.returncode == 0, done.stderr
    assert ' images/s: ' in done.stdout
    assert 'in batches of 2 from 0 workers' in done.stdout
