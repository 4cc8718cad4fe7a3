"""Draw what the network sees of a dataset after the pipeline, and the distribution of classes and sizes.

    python tools/browse_dataset.py configs/det/retinanet_emo2_custom.py --cfg-options data_root=PATH

Writes SPLIT_samples.png, with boxes, masks, maps or classes, and SPLIT_distribution.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _arguments import add_config_options, new_parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('--split', choices=('train', 'val', 'test'), default='train')
    parser.add_argument('--out', type=Path, default='browse', help='folder (default: %(default)s)')
    parser.add_argument(
        '--number', type=int, default=16, metavar='N', help='samples to draw (default: %(default)s)'
    )
    add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.config import load_config
    from emo2_mm.errors import UserError, reported

    with reported():
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError('pictures need matplotlib: pip install matplotlib') from None
        if args.number < 1:
            raise UserError(f'--number is {args.number}; give 1 or more')
        from emo2_mm.analysis.dataset_figure import browse_dataset

        cfg = load_config(args.config, args.cfg_options)
        for file in browse_dataset(cfg, args.split, args.out, args.number):
            print(file)


if __name__ == '__main__':
    main()
