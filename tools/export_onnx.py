"""Export a classifier, a segmentor, a detector or the backbone alone to ONNX, and check the graph.

    python tools/export_onnx.py CONFIG CHECKPOINT --shape 224 224 --out model.onnx

The graph takes `image`, normalised images (batch, 3, height, width): any number of them, of the size given
with --shape, or with --dynamic of any size. It gives

    logits                    of a classifier: (batch, classes), before the softmax
    logits                    of a segmentor: (batch, classes, height, width), before the argmax
    cls_score_0, bbox_pred_0  of a detector: what its head says of level 0, 1 ..., before boxes are decoded;
                              of one with two stages rpn_cls_score_0 ... and its neck's maps, feature_0 ...
    stride_4 ... stride_32    with --backbone: the maps of the stages

Norms are folded into the weights. The metadata of the file (texts; lists and numbers as JSON) say how images
are normalised and what the classes are called. With --quantize an int8 graph is written, too: NAME_int8.onnx.

The exit code is 0, or 1 if onnxruntime computes something else than torch: then no file is written; or 2 if
the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from _arguments import add_config_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of MMPretrain, MMSegmentation or MMDetection')
    parser.add_argument('checkpoint', help='its checkpoint (with --backbone also published weights)')
    parser.add_argument('--backbone', action='store_true', help='export the backbone alone')
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the images, or one number for both (default: what the config tests at)',
    )
    size.add_argument('--dynamic', action='store_true', help='take images of any size; slightly slower')
    parser.add_argument('--out', type=Path, help='file to write (default: NAME_OF_CONFIG.onnx)')
    parser.add_argument(
        '--quantize',
        type=Path,
        metavar='FOLDER',
        help='also write an int8 graph, calibrated on the images in this folder and the folders in it',
    )
    add_config_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    warnings.simplefilter('ignore')
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.export.onnx import export_onnx

    return export_onnx(
        args.config,
        args.checkpoint,
        args.backbone,
        args.shape,
        args.dynamic,
        args.out,
        args.quantize,
        args.cfg_options,
    )


if __name__ == '__main__':
    sys.exit(main())
