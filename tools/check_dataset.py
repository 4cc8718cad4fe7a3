"""Check the data sets that a config names, before training: annotations, images, masks, maps, labels.

    python tools/check_dataset.py configs/det/mask-rcnn_emo2_5m.py --split train

Takes detection in COCO's format, folders of images and maps, and folders of classes, which may be wrapped.
Each kind of finding says what training does with it. Exit code: 0 without errors (there may be warnings),
1 with errors, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import sys

from _arguments import add_config_options, new_parser


def parse_args() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = new_parser(__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--split',
        nargs='+',
        choices=('train', 'val', 'test'),
        default=('train', 'val', 'test'),
        help='what to check (default: all)',
    )
    parser.add_argument(
        '--max-shown', type=int, default=10, metavar='N', help='findings of one kind to print (default: 10)'
    )
    add_config_options(parser)
    return parser.parse_args(), parser


def main() -> int:
    args, parser = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.config import load_config
    from emo2_mm.datasets.check import check_datasets
    from emo2_mm.errors import UserError, print_any_name

    print_any_name()
    try:
        cfg = load_config(args.config, args.cfg_options)
        return 1 if check_datasets(cfg, args.split, args.max_shown) else 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except Exception as error:  # a config may raise anything
        parser.error(f'{args.config}: {error}')


if __name__ == '__main__':
    sys.exit(main())
