"""Count the parameters and multiply-adds of a config's model; no data set is needed."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from _arguments import add_config_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help="height and width of the image, or one number for both; the published tables' by default",
    )
    parser.add_argument('--json', action='store_true', help='print one line of JSON instead')
    add_config_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.analysis.complexity import count, table
    from emo2_mm.config import parse_options

    try:
        with redirect_stdout(sys.stderr):  # the frameworks' own messages
            sizes = count(args.config, args.shape, parse_options(args.cfg_options))
    except (OSError, ValueError) as error:
        print(f'error: {args.config}: {error}', file=sys.stderr)
        return 1
    if args.json:
        keys = ('params', 'params_inference', 'flops', 'shape')
        print(json.dumps({key: sizes[key] for key in keys}))
    else:
        print(table(sizes))
    return 0


if __name__ == '__main__':
    sys.exit(main())
