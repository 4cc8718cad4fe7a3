"""Train what a config describes, with MMPretrain, MMDetection or MMSegmentation.

    python tools/train.py configs/det/retinanet_emo2_5m.py

The config's ``default_scope`` selects the library.
"""

from __future__ import annotations

import argparse

from _arguments import runner_parser


def parse_args() -> argparse.Namespace:
    parser = runner_parser('Train what a config describes.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a name, from the latest in the work dir, if any',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate from auto_scale_lr.base_batch_size to the actual batch size',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.engine import load_config, reported, set_ranks, train

    with reported():
        set_ranks(args.launcher, args.local_rank)
        cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        train(cfg, args.amp, args.auto_scale_lr, not args.no_validate, args.resume)


if __name__ == '__main__':
    main()
