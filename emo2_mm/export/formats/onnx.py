"""ONNX, for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from .. import int8
from ..onnx_network import import_onnx
from .base import Format, Source, flat_metadata


def write_onnx(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.onnx``, ``model-fp16.onnx`` or ``model-int8.onnx``, with the metadata inside."""
    graph = source.int8_graph() if precision == 'int8' else source.graph()
    if precision == 'fp16':
        graph = int8.to_half(graph)
    import_onnx('onnx').helper.set_model_props(graph, flat_metadata(source.meta))
    name = 'model.onnx' if precision == 'fp32' else f'model-{precision}.onnx'
    (folder / name).write_bytes(graph.SerializeToString())
    return [name]


FORMAT = Format(
    'onnx',
    'ONNX Runtime',
    ('onnx', 'onnxruntime'),
    'onnx onnxruntime',
    'onnxruntime',
    write_onnx,
    precisions=('fp32', 'fp16', 'int8'),
    nms=True,
    dynamic=True,
    free_batch=True,
)
