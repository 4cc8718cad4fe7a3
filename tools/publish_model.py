"""Turn a checkpoint of a training run into a small file to hand on.

    python tools/publish_model.py IN_FILE OUT_FILE

keeps the weights to use, which are the averaged ones where a run averages them, and what says what they are:

    arch          size of EMOv2, such as 5m; left out if it is none of the published ones
    recipe        name of the config of the training
    epoch, iter   how far the training was
    cfg           text of that config, with the paths of its data; it never runs here
    dataset_meta  names and colours of the classes
    emo2_mm_version
    deployed      with --deploy, that batch norms are folded: EMOv2(deploy=True) loads such weights

Optimiser, schedule, logs and the weights before averaging are left out. If OUT_FILE ends in .safetensors, the
result is a file that can hold nothing but tensors and text, and this is its metadata; else it is `meta` in a
file of torch.save. The first 8 digits of the file's SHA-256 are added to its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _arguments import new_parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('in_file', metavar='IN_FILE', type=Path, help='checkpoint of a training run')
    parser.add_argument('out_file', metavar='OUT_FILE', type=Path, help='file to write')
    parser.add_argument('--deploy', action='store_true', help='fold batch norms into the weights')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.publish import publish

    try:
        print(publish(args.in_file, args.out_file, args.deploy))
    except (ImportError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
