"""What an exported format is, and what its converter gets."""

from __future__ import annotations

import importlib.util
import json
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from .. import environment, int8
from ..onnx_network import trace


class Planar(nn.Module):
    """A network of images (N, H, W, 3), for images (N, 3, H, W) with the same values in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        return self.network(image.permute(0, 2, 3, 1))


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
        picture: A picture (H, W, 3) uint8 in RGB to show the model with, if there is one.
        calibration: Inputs of a batch of one for int8, if asked for.
        opset: Of ONNX; None is the newest that suits all.
        notes: What a converter adds to the entry in model.json.
    """

    network: nn.Module
    example: Tensor
    outputs: list[str]
    axes: dict[str, dict[int, str]]
    meta: dict[str, Any]
    folder: Path
    picture: np.ndarray | None = None
    calibration: list[np.ndarray] = field(default_factory=list)
    opset: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
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
            self._int8 = int8.quantize(self.graph(), self.calibration)
        graph, self.notes['float_layers'] = self._int8
        return deepcopy(graph)

    def onnx_file(self, precision: str = 'fp32') -> Path:
        """The model as an ONNX file in :attr:`folder`, for converters that read one."""
        path = self.folder / f'source-{precision}.onnx'
        if precision == 'int8' or not path.exists():
            graph = self.int8_graph() if precision == 'int8' else self.graph()
            path.write_bytes(graph.SerializeToString())
        return path

    def planar(self) -> tuple[nn.Module, Tensor]:
        """Network and example for runtimes whose images are (N, 3, H, W) float32, with pixels as they are."""
        if self.example.dtype != torch.uint8:
            return self.network, self.example
        return Planar(self.network).eval(), self.example.permute(0, 3, 1, 2).float().contiguous()

    @property
    def size(self) -> list[int]:
        """Height and width of the images."""
        at = 1 if self.example.dtype == torch.uint8 else 2
        return list(self.example.shape[at : at + 2])

    def torchscript_file(self) -> Path:
        """The model as a TorchScript file in :attr:`folder`, traced once."""
        path = self.folder / 'source.pt'
        if not path.exists():
            with torch.no_grad():
                traced = torch.jit.trace(self.network, self.example, check_trace=False)
            torch.jit.save(torch.jit.freeze(traced.eval()), str(path))
        return path

    def convert_elsewhere(self, form: Format, file: Path, precision: str) -> None:
        """Write a file in a format whose packages may be in an environment of its own."""
        job = dict(
            format=form.name,
            network=str(self.torchscript_file()),
            shape=list(self.example.shape),
            dtype=str(self.example.dtype).split('.')[-1],
            outputs=self.outputs,
            metadata=flat_metadata(self.meta),
            precision=precision,
            threads=torch.get_num_threads(),
            file=str(file),
        )
        environment.convert(form.python(), job)


@dataclass(frozen=True)
class Format:
    """A format that models can be exported to.

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
        argmax: Whether the class map of a segmentor can be in the file. Otherwise it has the logits alone.
        check: For a format that cannot run on Linux: checks the written files in another way, returns in
            words what was checked, and raises ``UserError`` if they are wrong.
        simulate: For a format that cannot run on Linux: from the bundle's folder and the entry in model.json
            to what computes in another way what the file says, called as the classes of
            ``predict.RUNTIMES`` are; raises ``UserError`` if the file is wrong.
        environment: Commands for an environment of its own, where ``install`` does not fit into this one;
            then :mod:`emo2_mm.export.environment` finds it.
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
    argmax: bool = True
    check: Callable[[Source, Path, list[str]], str] | None = None
    simulate: Callable[[Path, dict[str, Any]], Any] | None = None
    environment: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def python(self) -> str:
        """The Python that has the modules: this one, or that of an environment of its own."""
        own = any(environment.variable(self.name) in command for command in self.environment)
        if own and self._missing_here():
            return environment.find_python(self.name) or sys.executable
        return sys.executable

    def missing(self) -> list[str]:
        """Modules that are not installed, in the environment of its own if there is one."""
        python = self.python()
        if python == sys.executable:
            return self._missing_here()
        return environment.missing_modules(python, self.modules)

    def _missing_here(self) -> list[str]:
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def require(self) -> None:
        """Raise ``UserError``, with the commands that help, unless all modules are there."""
        missing = self.missing()
        if missing:
            commands = self.environment or (f'pip install {self.install}',)
            remedy = '\n'.join(f'  {command}' for command in commands)
            where = 'here' if self.python() == sys.executable else f'for {self.python()}'
            raise UserError(
                f'--format {self.name} needs {", ".join(missing)}, not installed {where}; run\n{remedy}'
            )


def flat_metadata(meta: dict[str, Any]) -> dict[str, str]:
    """Metadata as texts: a text stays, anything else becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
