"""An interpreter of Core ML's programs in torch, for Core ML itself runs on Apple's systems alone.

It reads the file that was written, and computes what its operations are documented to compute: it shows that
a model was converted rightly, not how Apple's kernels round.
"""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError

MOST_AXES = 5  # of a tensor in Core ML


def conv(a: dict[str, Any]) -> Tensor:
    x, weight, strides, dilations = a['x'], a['weight'], a['strides'], a['dilations']
    if a['pad_type'] == 'custom':
        top, bottom, left, right = a['pad']
        x = F.pad(x, (left, right, top, bottom))
    elif a['pad_type'] != 'valid':
        raise UserError(f'Core ML: a convolution with padding of kind {a["pad_type"]} is not interpreted')
    return F.conv2d(x, weight, a.get('bias'), strides, 0, dilations, int(a['groups']))


def matmul(a: dict[str, Any]) -> Tensor:
    x = a['x'].transpose(-1, -2) if a['transpose_x'] else a['x']
    return x @ (a['y'].transpose(-1, -2) if a['transpose_y'] else a['y'])


def pad(a: dict[str, Any]) -> Tensor:
    if a['mode'] != 'constant':
        raise UserError(f'Core ML: padding of kind {a["mode"]} is not interpreted')
    pairs = [a['pad'][i : i + 2] for i in range(0, len(a['pad']), 2)]  # of the last axes, in their order
    return F.pad(a['x'], [n for pair in reversed(pairs) for n in pair], value=a['constant_val'])


def slice_by_index(a: dict[str, Any]) -> Tensor:
    x, count = a['x'], a['x'].ndim
    none = [False] * count
    begin_mask, end_mask, squeeze = (a.get(f'{name}_mask') or none for name in ('begin', 'end', 'squeeze'))
    places: list[Any] = []
    for i in range(count):
        first, last = (None if begin_mask[i] else a['begin'][i]), (None if end_mask[i] else a['end'][i])
        step = a['stride'][i] if a.get('stride') else 1
        places.append(a['begin'][i] if squeeze[i] else slice(first, last, step))
    return x[tuple(places)]


def upsample_bilinear(a: dict[str, Any]) -> Tensor:
    corners = bool(a['align_corners'])
    if not corners and a.get('half_pixel_centers') is False:
        raise UserError('Core ML: upsampling without centered pixels is not interpreted')
    height, width = a['x'].shape[2:]
    size = (
        math.floor(height * a['scale_factor_height'] + 1e-6),
        math.floor(width * a['scale_factor_width'] + 1e-6),
    )
    return F.interpolate(a['x'], size, mode='bilinear', align_corners=corners)


def upsample_nearest(a: dict[str, Any]) -> Tensor:
    return F.interpolate(
        a['x'], scale_factor=(float(a['scale_factor_height']), float(a['scale_factor_width']))
    )


def reduce(function: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    return lambda a: function(a['x'], tuple(a['axes']), keepdim=bool(a['keep_dims']))


def pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    return lambda a: function(torch.as_tensor(a['x']), torch.as_tensor(a['y']))


OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    'add': pair(torch.add),
    'cast': lambda a: a['x'].to(torch.int32) if a['dtype'] == 'int32' else a['x'].float(),
    'clip': lambda a: a['x'].clamp(a['alpha'], a['beta']),
    'concat': lambda a: torch.cat(a['values'], a['axis']),
    'conv': conv,
    'exp': lambda a: a['x'].exp(),
    'gelu': lambda a: F.gelu(a['x'], approximate='none' if a['mode'] == 'EXACT' else 'tanh'),
    'layer_norm': lambda a: F.layer_norm(a['x'], [a['x'].shape[-1]], a['gamma'], a['beta'], a['epsilon']),
    'linear': lambda a: F.linear(a['x'], a['weight'], a.get('bias')),
    'matmul': matmul,
    'maximum': pair(torch.maximum),
    'minimum': pair(torch.minimum),
    'mul': pair(torch.mul),
    'pad': pad,
    'real_div': pair(torch.div),
    'reduce_argmax': lambda a: a['x'].argmax(a['axis'], keepdim=bool(a['keep_dims'])).to(torch.int32),
    'reduce_mean': reduce(torch.mean),
    'relu': lambda a: a['x'].relu(),
    'reshape': lambda a: a['x'].reshape(a['shape']),
    'sigmoid': lambda a: a['x'].sigmoid(),
    'silu': lambda a: F.silu(a['x']),
    'slice_by_index': slice_by_index,
    'softmax': lambda a: a['x'].softmax(a['axis']),
    'sub': pair(torch.sub),
    'transpose': lambda a: a['x'].permute(a['perm']),
    'upsample_bilinear': upsample_bilinear,
    'upsample_nearest_neighbor': upsample_nearest,
}


class Program:
    """A program of Core ML, read from a file.

    Args:
        path: A folder ``NAME.mlpackage``.

    Raises:
        UserError: If an operation is not interpreted, or a tensor has more axes than Core ML takes.
    """

    def __init__(self, path: Path) -> None:
        coremltools = import_module('coremltools')
        load = import_module('coremltools.converters.mil.frontend.milproto.load').load
        self.spec = coremltools.models.utils.load_spec(str(path))
        weights = path / 'Data' / 'com.apple.CoreML' / 'weights'
        self.half = import_module('coremltools.converters.mil.mil').types.fp16
        program = load(self.spec, self.spec.specificationVersion, str(weights))
        self.function = program.functions['main']
        self.operations = [each for each in self.function.operations if not each.op_type.startswith('const')]
        unknown = sorted({each.op_type for each in self.operations} - set(OPERATIONS))
        if unknown:
            raise UserError(f'Core ML: {", ".join(unknown)} cannot be checked here')
        axes = max(output.rank for each in self.function.operations for output in each.outputs)
        if axes > MOST_AXES:
            raise UserError(f'Core ML: a tensor has {axes} axes, more than {MOST_AXES}')

    @torch.no_grad()
    def __call__(self, image: Tensor, names: Sequence[str]) -> list[np.ndarray]:
        """Outputs by name, of images (N, 3, H, W) in float32."""
        known: dict[str, Tensor] = {next(iter(self.function.inputs)): image}

        def value(given: Any) -> Any:
            if isinstance(given, (tuple, list)):
                return [value(each) for each in given]
            if given.name in known:
                return known[given.name]
            constant = given.val
            if constant is None:  # weights of fewer bits
                constant = given.op.materialized_val_inference()
            if isinstance(constant, np.ndarray):
                if constant.dtype.kind == 'f':
                    known[given.name] = torch.from_numpy(constant.astype(np.float32))
                    return known[given.name]
                return constant.tolist()
            return constant.item() if isinstance(constant, np.generic) else constant

        for each in self.operations:
            found = OPERATIONS[each.op_type]({k: value(v) for k, v in each.inputs.items() if v is not None})
            output = each.outputs[0]
            known[output.name] = found.half().float() if output.dtype == self.half else found
        return [known[name].numpy() for name in names]
