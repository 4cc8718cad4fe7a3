"""Measure what the training data loader of a config gives by itself: images read, augmented and collated.

    python tools/loader_speed.py configs/demo/emo2_1m_digits.py

A training that could take more images in a second than this waits for its data (``data_time`` in its log).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import own_data
import runtime
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


def main() -> None:
    parser = runtime.new_parser('Measure the training data loader of a config.')
    parser.add_argument('--seconds', type=float, default=20.0, help='how long (default: %(default)s)')
    args = parser.parse_args()
    cfg = runtime.load_config(args)
    own_data.complete(cfg)
    runtime.check_data(cfg, 'train')
    rate, loader = measure(cfg, args.seconds), cfg.train_dataloader
    print(
        f'{rate.images / rate.seconds:.1f} images/s: {rate.images} in {rate.seconds:.1f} s, in batches of '
        f'{loader.batch_size} from {loader.num_workers} workers; the first batch took {rate.start:.1f} s'
    )


if __name__ == '__main__':
    main()
