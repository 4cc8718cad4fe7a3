"""Export a classifier, a segmentor, a detector or the backbone alone to a bundle that runs without torch.

    python tools/export.py CONFIG CHECKPOINT --format onnx --out DIR

DIR gets the model files, model.json (what they take and give), predict.py (runs them on images; needs NumPy,
Pillow and the runtime), README.md and an example picture. The models are end to end: images go in as pixels
(batch, height, width, 3), and out come

    dets, labels    of a detector: boxes with scores (batch, K, 5) and classes (batch, K), after NMS;
                    of Mask R-CNN also masks. Formats without NMS give boxes and scores; predict.py chooses
    map             of a segmentor: the class of each pixel, and the logits
    probabilities   of a classifier
    stride_4 ...    with --backbone: the feature maps of the stages

With --raw they give the maps of the heads, or logits. Every model is run and compared with torch.

The exit code is 0; 1 if a model does not compute what torch does or cannot be converted, then nothing is
written; 2 if the arguments cannot be used.
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
    parser.add_argument(
        '--format',
        nargs='+',
        default=['onnx'],
        metavar='NAME',
        help='one or more formats, or all: every one whose packages are installed (default: onnx)',
    )
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write')
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the input, or one number for both (default: what the config tests at)',
    )
    size.add_argument('--dynamic', action='store_true', help='take images of any size; slightly slower')
    parser.add_argument(
        '--batch', type=int, metavar='N', help='take just N images at once (default: any number)'
    )
    parser.add_argument(
        '--quantize',
        type=Path,
        metavar='FOLDER',
        help='also write int8 models, calibrated on the images in this folder and the folders in it',
    )
    parser.add_argument(
        '--half', action='store_true', help='also write models with weights in half precision'
    )
    parser.add_argument('--opset', type=int, metavar='N', help='of ONNX (default: 17)')
    parser.add_argument('--backbone', action='store_true', help='export the backbone alone')
    parser.add_argument('--raw', action='store_true', help='give the maps of the heads, or logits')
    parser.add_argument(
        '--float-input',
        action='store_true',
        help='take normalized images (batch, 3, height, width) in float32',
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='write a table of all models into DIR; a format that fails is listed and left out',
    )
    add_config_options(parser)
    return parser.parse_args()


def main() -> int:
    args = vars(parse_args())
    warnings.simplefilter('ignore')
    # After the arguments are read: importing torch takes seconds
    from emo2_mm.export.exporter import Options, export

    args['formats'] = args.pop('format')
    return export(args.pop('config'), args.pop('checkpoint'), Options(**args))


if __name__ == '__main__':
    sys.exit(main())
