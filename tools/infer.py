"""Run inference and save visualizations and JSON.

    python tools/infer.py CONFIG CHECKPOINT IMAGE_OR_FOLDER --out predictions

Of a folder all files are taken, but neither hidden ones nor those in folders in it, as the inferencers of
the libraries do. For each image NAME this writes vis/NAME, the drawn picture (vis/NAME.jpg, unless NAME ends
in .jpg, .jpeg or .png), and preds/NAME.json:

    image, width, height  the file, and its size in pixels
    objects               of a detector, best first: class, label (number of the class), score (0 - 1), box
                          (left, top, right, bottom in pixels), and with masks mask (COCO's run lengths)
    segments              of a segmentor, largest first: class, label, share (of all pixels, 0 - 1)
    map                   of a segmentor: the image of labels beside the JSON file, preds/NAME.png
    classes               of a classifier, the best five: class, label, score (0 - 1)

The names of the classes are those in the checkpoint, else those of the config, else numbers. A file that is
damaged or not an image is named, skipped and counted. The exit code is 0, or 1 if a file was skipped, or 2 if
the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from _arguments import new_parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('config', help='config of MMDetection, MMSegmentation or MMPretrain')
    parser.add_argument('checkpoint', help='checkpoint of it; read without running code in it')
    parser.add_argument('images', metavar='IMAGE_OR_FOLDER', type=Path)
    parser.add_argument('--out', type=Path, default='predictions', help='folder (default: %(default)s)')
    parser.add_argument('--device', help='such as cpu or cuda:1 (default: the first GPU, if any)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detectors: drop lower scores (default: %(default)s)',
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    warnings.simplefilter('ignore')
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.apis import infer
    from emo2_mm.errors import print_any_name

    print_any_name()

    try:
        skipped = infer(args.config, args.checkpoint, args.images, args.out, args.device, args.score_thr)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 1 if skipped else 0


if __name__ == '__main__':
    sys.exit(main())
