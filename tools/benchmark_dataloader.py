"""Measure the throughput of a config's training data loader: images read, augmented and collated.

    python tools/benchmark_dataloader.py configs/demo/emo2_1m_digits.py

A training run that could process more images per second waits for its data (``data_time`` in its log).
"""

from __future__ import annotations

from _arguments import runner_parser


def main() -> None:
    parser = runner_parser("Measure the throughput of a config's training data loader.")
    parser.add_argument('--seconds', type=float, default=20.0, help='how long (default: %(default)s)')
    args = parser.parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.config import load_config
    from emo2_mm.datasets.custom import apply_custom_dataset
    from emo2_mm.datasets.loader_speed import measure
    from emo2_mm.engine.preflight import check_data
    from emo2_mm.errors import reported

    with reported():
        cfg = load_config(args.config, args.cfg_options)
        apply_custom_dataset(cfg)
        check_data(cfg, 'train')
    rate, loader = measure(cfg, args.seconds), cfg.train_dataloader
    print(
        f'{rate.images / rate.seconds:.1f} images/s: {rate.images} in {rate.seconds:.1f} s, in batches of '
        f'{loader.batch_size} from {loader.num_workers} workers; the first batch took {rate.start:.1f} s'
    )


if __name__ == '__main__':
    main()
