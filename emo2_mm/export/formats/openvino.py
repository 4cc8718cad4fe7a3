"""OpenVINO's intermediate representation, read from ONNX."""

from __future__ import annotations

import importlib
from pathlib import Path

from .base import Format, Source, flat_metadata


def write_openvino(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.xml`` and ``model.bin``, with the metadata as runtime information."""
    openvino = importlib.import_module('openvino')
    path = source.onnx_file('int8' if precision == 'int8' else 'fp32')
    model = openvino.Core().read_model(str(path))
    for key, value in flat_metadata(source.meta).items():
        model.set_rt_info(value, ['emo2_mm', key])
    stem = 'model' if precision == 'fp32' else f'model-{precision}'
    openvino.save_model(model, str(folder / f'{stem}.xml'), compress_to_fp16=precision == 'fp16')
    return [f'{stem}.xml', f'{stem}.bin']


FORMAT = Format(
    'openvino',
    'OpenVINO',
    ('onnx', 'openvino'),
    'onnx openvino',
    'openvino',
    write_openvino,
    precisions=('fp32', 'fp16', 'int8'),
    nms=True,
    dynamic=True,
    free_batch=True,
)
