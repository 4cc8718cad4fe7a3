"""Throughput of a training data loader."""

from __future__ import annotations

import time
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing


class Rate(NamedTuple):
    """Images taken in so many seconds; before, the seconds until the first batch was there."""

    images: int
    seconds: float
    start: float


def measure(cfg: Config, seconds: float) -> Rate:
    """Take batches for so many seconds, from epoch to epoch; one at least after the first."""
    init_default_scope(cfg.default_scope)
    set_multi_processing(**cfg.env_cfg.mp_cfg)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    begin = time.perf_counter()
    images, first = 0, None
    while True:
        for batch in loader:
            now = time.perf_counter()
            first = first or now
            images += len(batch['inputs']) if now > first else 0
            if images and now - first >= seconds:
                return Rate(images, now - first, first - begin)
