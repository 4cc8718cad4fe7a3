"""Core ML, for iOS and macOS, converted from the traced network."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import torch

from ...errors import UserError
from ..end_to_end import Unsupported
from .base import Format, Source, flat_metadata
from .mil import Program

LIMITS = (
    'checked by an interpreter of its operations in torch, not run: Core ML runs on Apple systems alone (iOS '
    '16, macOS 13 or newer)',
    'pixels go in as one image (CVPixelBuffer), whose colors Core ML orders itself',
)


def write_coreml(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.mlpackage``, ``model-fp16.mlpackage`` or ``model-int8.mlpackage``, with the metadata inside."""
    network, example = source.planar()
    pixels = source.example.dtype == torch.uint8
    if pixels and len(example) != 1:
        raise Unsupported('it takes one image at a time; leave out --batch or give --float-input')
    with _quiet(), torch.no_grad():
        coremltools = import_module('coremltools')
        traced = torch.jit.trace(network, example, check_trace=False)
        given: Any = coremltools.TensorType('image', example.shape)
        if pixels:
            colors = source.meta['color_order']
            source.notes['color_layout'] = colors
            given = coremltools.ImageType('image', example.shape, color_layout=colors)
        integers = ('map', 'labels')
        outputs = [
            coremltools.TensorType(name, dtype=np.int32 if name in integers else np.float32)
            for name in source.outputs
        ]
        model = coremltools.convert(
            traced,
            inputs=[given],
            outputs=outputs,
            convert_to='mlprogram',
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=_half(coremltools) if precision == 'fp16' else coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
        if precision == 'int8':
            model = _few_bits(coremltools.optimize.coreml, model)
            source.notes['limits'] = [*LIMITS, 'int8 holds the weights alone; it computes in fp32']
    model.user_defined_metadata.update(flat_metadata(source.meta))
    name = 'model.mlpackage' if precision == 'fp32' else f'model-{precision}.mlpackage'
    model.save(str(folder / name))
    return [name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and warnings of what is missing on Linux."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)


def _half(coremltools: Any) -> Any:
    """Half precision for maps (N, C, H, W), but not for coordinates of boxes, which need more digits."""
    return coremltools.transform.FP16ComputePrecision(lambda op: all(y.rank == 4 for y in op.outputs))


def _few_bits(tools: Any, model: Any) -> Any:
    weights = tools.OpLinearQuantizerConfig(mode='linear_symmetric')
    return tools.linear_quantize_weights(model, tools.OptimizationConfig(weights))


class Simulation:
    """What ``predict.CoreML`` does, on any system: see :mod:`emo2_mm.export.formats.mil`.

    Raises:
        UserError: If the file does not take images as model.json says, or has no metadata.
    """

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        with _quiet():
            self.program = Program(folder / entry['files'][0])
        self.types = {output['name']: output['dtype'] for output in entry['outputs']}
        given = self.program.spec.description.input[0].type
        pixels = entry['input']['dtype'] == 'uint8'
        if given.WhichOneof('Type') != ('imageType' if pixels else 'multiArrayType'):
            raise UserError(f'Core ML: the input is a {given.WhichOneof("Type")}')
        if pixels:
            size = [given.imageType.height, given.imageType.width]
            kinds = {'RGB': 20, 'BGR': 30}
            if (
                size != entry['input']['shape'][1:3]
                or given.imageType.colorSpace != kinds[entry['color_layout']]
            ):
                raise UserError(f'Core ML: the input is an image of {size} (H, W), or of other colors')
        if 'config' not in self.program.spec.description.metadata.userDefined:
            raise UserError('Core ML: the metadata are missing')

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        x = torch.from_numpy(image)
        if x.dtype == torch.uint8:
            x = x.permute(0, 3, 1, 2).float()
        return [y.astype(self.types[name], copy=False) for name, y in zip(names, self.program(x, names))]


FORMAT = Format(
    'coreml',
    'Core ML',
    ('coremltools',),
    'coremltools',
    'coremltools',
    write_coreml,
    precisions=('fp32', 'fp16', 'int8'),
    simulate=Simulation,
    limits=LIMITS,
)
