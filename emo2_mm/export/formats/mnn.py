"""MNN, for phones, converted from ONNX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..end_to_end import Unsupported
from .base import Format, Source

# The commands mnnconvert and mnnquant of the package install another package with pip and send usage data;
# the function behind them only converts. It may end the process, so it gets one of its own.
CONVERT = 'import sys, MNN, _tools; _tools.mnnconvert(sys.argv)'
LIMITS = ('detectors take one image at a time',)


def write_mnn(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.mnn`` or ``model-int8.mnn``."""
    if 'dets' in source.outputs and len(source.example) != 1:
        raise Unsupported('its NMS takes one image at a time; leave out --batch')
    name = 'model.mnn' if precision == 'fp32' else f'model-{precision}.mnn'
    command = [sys.executable, '-c', CONVERT, '-f', 'ONNX', '--bizCode', 'emo2_mm']
    command += ['--modelFile', str(source.onnx_file()), '--MNNModel', str(folder / name)]
    command += ['--useGeluApproximation', '0']  # the default, with tanh, is 1e-3 away
    if precision == 'int8':
        command += ['--weightQuantBits', '8']
        source.notes['limits'] = [*LIMITS, 'int8 holds the weights alone; it computes in fp32']
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    if result.returncode or 'Converted Success' not in log or not (folder / name).is_file():
        raise RuntimeError(f'the converter ends with {result.returncode}: {" ".join(log[-300:].split())}')
    return [name]


FORMAT = Format(
    'mnn',
    'MNN',
    ('onnx', 'MNN'),
    'onnx MNN',
    'MNN',
    write_mnn,
    precisions=('fp32', 'int8'),  # its fp16 was 1.3e-2 away in a trained classifier, that of others 1e-3
    nms=True,
    dynamic=True,
    limits=LIMITS,
)
