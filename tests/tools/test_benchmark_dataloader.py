"""tools/loader_speed.py counts the images that a loader gave."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from helpers.tiny import CLASSIFIER, DETECTOR, ROOT, SEGMENTOR, run, write_config, write_data


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return importlib.import_module('loader_speed')


@pytest.mark.parametrize('text', [CLASSIFIER, DETECTOR, SEGMENTOR], ids=['cls', 'det', 'seg'])
def test_images_of_several_epochs(tool: Any, tmp_path: Any, monkeypatch: Any, text: str) -> None:
    """A second a batch: the first is not counted, then five batches of two, over epochs of two."""
    cfg = Config.fromfile(write_config(tmp_path, text))
    pytest.importorskip(cfg.default_scope)
    write_data(tmp_path)
    cfg.train_dataloader.setdefault('collate_fn', dict(type='pseudo_collate'))
    clock = iter(range(100))
    monkeypatch.setattr(tool, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tool.measure(cfg, seconds=4.5) == tool.Rate(images=10, seconds=5, start=1)


@pytest.mark.slow
def test_rate_is_told(tmp_path: Any) -> None:
    pytest.importorskip('mmdet')
    write_data(tmp_path)
    done = run(tmp_path, 'loader_speed.py', write_config(tmp_path, DETECTOR), '--seconds', 0.1)
    assert done.returncode == 0, done.stderr
    assert ' images/s: ' in done.stdout
    assert 'in batches of 2 from 0 workers' in done.stdout
