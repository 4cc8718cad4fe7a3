"""LiteRT, earlier called TensorFlow Lite, converted from torch in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from .. import environment
from .base import Format, Source

INSTALL = 'torch==2.13.0 litert-torch==0.10.0 ai-edge-litert==2.3.0 pillow'


def write_litert(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.tflite``, ``model-fp16.tflite`` or ``model-int8.tflite``, with the metadata inside."""
    name = 'model.tflite' if precision == 'fp32' else f'model-{precision}.tflite'
    source.convert_elsewhere(FORMAT, folder / name, precision)
    return [name]


FORMAT = Format(
    'litert',
    'LiteRT',
    ('litert_torch', 'ai_edge_litert', 'PIL'),
    INSTALL,
    'ai-edge-litert',
    write_litert,
    precisions=('fp32', 'fp16', 'int8'),
    environment=environment.commands('litert', INSTALL),
    limits=('images of one size, in batches of one number', 'NMS in predict.py'),
)
