"""Formats that a model is exported to: what each needs, how it is written, and what it cannot do.

A format is an entry of :data:`FORMATS`. Its file is run by the class of the same name in
:mod:`emo2_mm.export.predict`, which is copied into every bundle: what is checked is what is shipped.
"""

from __future__ import annotations

import importlib.util
import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from . import int8
from .onnx_network import import_onnx, trace


@dataclass
class Source:
    """A model as a converter takes it.

    Attributes:
        network: In eval mode, folded, with tensors of rank 4 at most; maps :attr:`example` to a tuple.
        example: Input of the exported size: (N, H, W, 3) uint8 or (N, 3, H, W) float32.
        outputs: Names of the outputs.
        axes: Axes of ``image`` and of the outputs that are free, with names: ``{'image': {0: 'batch'}}``.
        meta: Content of model.json but for ``models``, to be stored in the file where it has room.
        folder: Temporary folder for intermediate files.
        calibration: Inputs of a batch of one for int8, if asked for.
        opset: Of ONNX; None is the newest that suits all.
        notes: What a converter adds to the entry in model.json, by precision.
    """

    network: nn.Module
    example: Tensor
    outputs: list[str]
    axes: dict[str, dict[int, str]]
    meta: dict[str, Any]
    folder: Path
    calibration: list[np.ndarray] = field(default_factory=list)
    opset: int | None = None
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _graph: Any = None
    _int8: Any = None

    def graph(self) -> Any:
        """The model as an ONNX ``ModelProto``, traced once."""
        if self._graph is None:
            self._graph = trace(self.network, self.example, self.outputs, self.axes, self.opset)
        return deepcopy(self._graph)

    def int8_graph(self) -> Any:
        """The model as an int8 ``ModelProto``, calibrated once; ``notes`` get the layers left in float."""
        if self._int8 is None:
            self._int8, kept = int8.quantize(self.graph(), self.calibration)
            self.notes['int8'] = dict(float_layers=kept)
        return deepcopy(self._int8)

    def onnx_file(self, precision: str = 'fp32') -> Path:
        """The model as an ONNX file in :attr:`folder`, for converters that read one."""
        path = self.folder / f'source-{precision}.onnx'
        if not path.exists():
            graph = self.int8_graph() if precision == 'int8' else self.graph()
            path.write_bytes(graph.SerializeToString())
        return path


@dataclass(frozen=True)
class Format:
    """One entry of :data:`FORMATS`.

    Attributes:
        name: On the command line, and of the runtime in ``predict.RUNTIMES``.
        title: For tables.
        modules: Names that must be importable to convert.
        install: Arguments of ``pip install`` for converting.
        runtime: Arguments of ``pip install`` for running.
        convert: Writes the model into a folder, in a precision; returns the names of the files, first the one
            to load.
        precisions: Out of 'fp32', 'fp16' and 'int8'.
        nms: Whether non-maximum suppression can be in the file. Otherwise it has decoded boxes, and
            predict.py chooses among them.
        dtype: 'uint8', images (N, H, W, 3), normalized inside, or 'float32', normalized ones (N, 3, H, W).
        dynamic: Whether images of any size can be taken.
        free_batch: Whether any number of images can be taken at once.
        check: For a format that cannot run on Linux: checks the written files in another way, returns in
            words what was checked, and raises ``UserError`` if they are wrong.
        environment: Commands for an environment of its own, where ``install`` does not fit into this one.
        limits: What it cannot do, in words.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    install: str
    runtime: str
    convert: Callable[[Source, Path, str], list[str]]
    precisions: tuple[str, ...] = ('fp32',)
    nms: bool = False
    dtype: str = 'uint8'
    dynamic: bool = False
    free_batch: bool = False
    check: Callable[[Source, Path, list[str]], str] | None = None
    environment: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def require(self) -> None:
        """Raise ``UserError``, with the commands that help, unless all modules are there."""
        missing = self.missing()
        if missing:
            commands = self.environment or (f'pip install {self.install}',)
            remedy = '\n'.join(f'  {command}' for command in commands)
            raise UserError(
                f'--format {self.name} needs {", ".join(missing)}, not installed here; run\n{remedy}'
            )


def write_onnx(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.onnx``, ``model-fp16.onnx`` or ``model-int8.onnx``, with the metadata inside."""
    graph = source.int8_graph() if precision == 'int8' else source.graph()
    if precision == 'fp16':
        graph = int8.to_half(graph)
    import_onnx('onnx').helper.set_model_props(graph, flat_metadata(source.meta))
    name = 'model.onnx' if precision == 'fp32' else f'model-{precision}.onnx'
    (folder / name).write_bytes(graph.SerializeToString())
    return [name]


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


def write_torchscript(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.pt``, traced."""
    with torch.no_grad():
        traced = torch.jit.trace(source.network, source.example, check_trace=False)
    traced = torch.jit.freeze(traced.eval())
    torch.jit.save(traced, str(folder / 'model.pt'))
    return ['model.pt']


def flat_metadata(meta: dict[str, Any]) -> dict[str, str]:
    """Metadata as texts: a text stays, anything else becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
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
        ),
        Format(
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
        ),
        Format(
            'torchscript',
            'TorchScript',
            ('torch',),
            'torch',
            'torch',
            write_torchscript,
            free_batch=True,
            limits=('predict.py needs torch', 'NMS in predict.py'),
        ),
    )
}


def find_formats(names: list[str]) -> list[Format]:
    """Formats by name; ``all`` is every one whose packages are installed.

    Raises:
        UserError: If a name is unknown, or a package is missing.
    """
    if names == ['all']:
        return [each for each in FORMATS.values() if not each.missing()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise UserError(f'--format {unknown[0]} is unknown; give one of {", ".join(FORMATS)}, or all')
    found = [FORMATS[name] for name in dict.fromkeys(names)]
    for each in found:
        each.require()
    return found
