"""Convert a dataset of another format into what the custom configs read; the source stays as it is.

    python tools/convert_dataset.py SRC DST --val-fraction 0.2

Reads COCO, YOLO (boxes and segments), Pascal VOC, LabelMe, CVAT for images 1.1, images with masks in
colours or numbers, and folders of classes, and recognises which it is. Writes boxes and outlines in COCO's
format, maps of class numbers (--to maps), or folders of classes, with links to the images. Prints what it
wrote, and what it left out or changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _arguments import new_parser

FORMATS = ('coco', 'yolo', 'voc', 'labelme', 'cvat', 'masks', 'folders')


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('source', metavar='SRC', type=Path, help='folder of the dataset')
    parser.add_argument('target', metavar='DST', type=Path, help='new folder')
    parser.add_argument('--format', choices=FORMATS, help='format of SRC (default: recognised)')
    parser.add_argument(
        '--to', choices=('boxes', 'maps', 'folders'), help='what to write (default: boxes, or what fits SRC)'
    )
    parser.add_argument(
        '--val-fraction',
        type=float,
        metavar='SHARE',
        help='share of the training images to validate on, such as 0.2; the same ones in each run',
    )
    parser.add_argument('--copy', action='store_true', help='copy the images instead of linking to them')
    parser.add_argument(
        '--boxes-as-masks', action='store_true', help='write the box as outline of objects that have none'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from emo2_mm.datasets.convert import CONFIGS, convert_dataset
    from emo2_mm.errors import UserError, reported

    with reported():
        if args.val_fraction is not None and not 0 < args.val_fraction < 1:
            raise UserError(
                f'--val-fraction is {args.val_fraction}; give a share between 0 and 1, such as 0.2'
            )
        to, lines = convert_dataset(
            args.source, args.target, args.format, args.to, args.val_fraction, args.copy, args.boxes_as_masks
        )
        print('\n'.join(lines))
        print(f'written to {args.target}; train with')
        print(f'  python tools/train.py {CONFIGS[to]} --cfg-options "data_root={args.target}"')


if __name__ == '__main__':
    main()
