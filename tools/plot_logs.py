"""Draw what training runs logged: by default the loss, the learning rate and all metrics of the validation.

    python tools/plot_logs.py work_dirs/retinanet_emo2_5m work_dirs/retinanet_emo2_1m --out curves.png
    python tools/plot_logs.py work_dirs/retinanet_emo2_5m --keys loss_cls loss_bbox coco/bbox_mAP

A run is a work folder, or one scalars.json. A run that was interrupted and resumed left several of these in
its work folder: they are joined. From where a later one begins, it replaces the earlier ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _arguments import new_parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='work folder or scalars.json')
    parser.add_argument('--keys', metavar='KEY', nargs='+', help='what to draw, such as loss coco/bbox_mAP')
    parser.add_argument('--out', type=Path, default='curves.png', help='picture (default: %(default)s)')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # After the arguments are read: importing torch and matplotlib takes seconds
    from emo2_mm.analysis.training_log import choose_keys, draw, read_run

    names = [path.resolve().name for path in args.runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.runs]
    try:
        runs = [read_run(path, name) for path, name in zip(args.runs, names)]
        for run in runs:
            missing = [key for key in args.keys or [] if key not in run.logged()]
            if missing:
                raise ValueError(f'{run.name} has no {", ".join(missing)}; it has {", ".join(run.logged())}')
        draw(runs, args.keys or choose_keys(runs), args.out)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
