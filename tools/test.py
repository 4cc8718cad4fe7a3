"""Evaluate a checkpoint, with MMPretrain, MMDetection or MMSegmentation.

    python tools/test.py configs/det/retinanet_emo2_5m.py work_dirs/retinanet_emo2_5m/epoch_12.pth

The config's ``default_scope`` selects the library.
"""

from __future__ import annotations

import argparse

from _arguments import runner_parser


def parse_args() -> argparse.Namespace:
    parser = runner_parser('Evaluate a checkpoint.')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='save the predictions: a .pkl file, or for segmentation a folder of label maps',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='directory for visualized predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show waits')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--deploy', action='store_true', help='fold batch norms into the weights first')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.engine import load_config, reported, set_ranks, test

    with reported():
        set_ranks(args.launcher, args.local_rank)
        cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        test(
            cfg,
            args.checkpoint,
            amp=args.amp,
            out=args.out,
            show=args.show,
            show_dir=args.show_dir,
            wait_time=args.wait_time,
            tta=args.tta,
            deploy=args.deploy,
        )


if __name__ == '__main__':
    main()
