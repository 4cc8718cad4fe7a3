"""Convert a released EMOv2 classification file to an MMPretrain ImageClassifier checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Load DST with mmpretrain.get_model('configs/cls/emo2_5m.py', pretrained=DST). "
        'A backbone alone needs no conversion: init_cfg takes published files as they are.',
    )
    parser.add_argument('src', metavar='SRC', help='published file (path or http address)')
    parser.add_argument(
        'dst',
        metavar='DST',
        type=Path,
        help='checkpoint to write; of safetensors if its name ends in .safetensors, else of torch.save',
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.convert import convert

    try:
        print(convert(args.src, args.dst))
    except (ImportError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
