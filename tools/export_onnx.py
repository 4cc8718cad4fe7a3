"""Export a model to one ONNX file: tools/export.py under its old name and with its old arguments.

    python tools/export_onnx.py CONFIG CHECKPOINT --shape 224 224 --out model.onnx

The file takes normalized images (batch, 3, height, width) and gives the maps of the heads, or logits. That is

    python tools/export.py CONFIG CHECKPOINT --format onnx --raw --float-input --out DIR

of which only the model is kept; with --quantize also NAME_int8.onnx. Prefer tools/export.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
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
    size.add_argument('--shape', type=int, nargs='+', metavar='N', help='height and width of the images')
    size.add_argument('--dynamic', action='store_true', help='take images of any size')
    parser.add_argument('--out', type=Path, help='file to write (default: NAME_OF_CONFIG.onnx)')
    parser.add_argument('--quantize', type=Path, metavar='FOLDER', help='also write an int8 file')
    add_config_options(parser)
    return parser.parse_args()


def main() -> int:
    args = vars(parse_args())
    warnings.simplefilter('ignore')
    from emo2_mm.export.exporter import Options, export

    config, checkpoint, out = args.pop('config'), args.pop('checkpoint'), args.pop('out')
    out = out or Path(Path(config).stem + ('_backbone' if args['backbone'] else '') + '.onnx')
    with tempfile.TemporaryDirectory() as folder:
        options = Options(formats=['onnx'], out=Path(folder, 'bundle'), raw=True, float_input=True, **args)
        status = export(config, checkpoint, options)
        if status == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.out / 'model.onnx', out)
            print(out)
            if args['quantize']:
                small = out.with_name(f'{out.stem}_int8.onnx')
                shutil.copyfile(options.out / 'model-int8.onnx', small)
                print(small)
    return status


if __name__ == '__main__':
    sys.exit(main())
