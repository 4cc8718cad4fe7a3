"""Draw what one point of an image attends to, in its neighbour and its distant window.

    python tools/show_windows.py CONFIG CHECKPOINT IMAGE --point X Y --out windows.png

There is a row for each stage that attends (strides 16 and 32). The token at the point looks at two windows:
the neighbour window of adjacent tokens, and the distant window of tokens spread over the whole image. The
attention is the mean over heads and blocks of the stage; the most attended token of a panel is the brightest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _arguments import new_parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('config', help='config of a classifier, detector or segmentor on EMOv2')
    parser.add_argument('checkpoint', help='its checkpoint, or published weights of the backbone')
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--point', type=float, nargs=2, metavar=('X', 'Y'), help='pixel of the image; its centre by default'
    )
    parser.add_argument('--out', type=Path, default='windows.png', help='picture (default: %(default)s)')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.analysis.attention_maps import show

    try:
        show(args.config, args.checkpoint, args.image, args.point, args.out)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
