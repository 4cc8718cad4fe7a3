"""Linear layers of a deployed network, whose weights are packed once instead of in each forward pass.

Two libraries in torch can do that. MKL is faster on Intel's CPUs (deployed, 1 x 224 x 224: 4 %), oneDNN on
others, where MKL runs code for older instructions (7 %; 8 x 224 x 224: 24 %).
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch's own compiler calls these operators; not every build of torch has them
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
HAS_MKL = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, '_mkl_linear')
SAMPLES = 16  # elements compared in each pass; more would be read from memory, not from the cache
BATCH_HINT = 49  # rows oneDNN packs for; a layout for few rows also works well for many


def _is_intel() -> bool:
    try:
        return 'GenuineIntel' in Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        return 'GenuineIntel' in platform.processor()


USES_MKL = HAS_MKL and _is_intel()


class _Packed(NamedTuple):
    """A packed weight, and what the weight was that it was made of."""

    weight: Tensor
    version: int
    address: int
    sample: Tensor  # a view
    values: Tensor  # its elements at that time
    packed: Tensor
    rows: (
        int  # of the input that MKL packs for; for others it would take the plain weight, and round otherwise
    )


class PackedLinear(nn.Linear):
    """:class:`torch.nn.Linear` that also keeps its weight packed, for inference on a CPU.

    State dict, parameters and results are those of the linear layer. The packed weight is made when it is
    first needed, and again after the weight has changed: by ``load_state_dict``, in place, or as another
    tensor. Torch does not track changes in place through ``.data`` or a NumPy array. They are noticed if
    they begin with ``layer.weight``, or change any of 16 elements that are compared, as all that scale or
    replace the whole weight do. Copies and files hold no packed weight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: _Packed | None = None

    def __getattr__(self, name: str) -> Any:
        if name == 'weight':  # who reads it may change it untracked
            self.__dict__['_packed'] = None
        return super().__getattr__(name)

    def packed_weight(self, rows: int) -> _Packed | None:
        """The packed weight, up to date, or None where the plain one has to do.

        That is so without oneDNN, in other types than float32, and for tensors made in
        :func:`torch.inference_mode`, whose changes torch does not track.

        Args:
            rows: Of the input.
        """
        weight: Any = self._parameters['weight']  # never None in a linear layer
        if not HAS_ONEDNN or not torch._C._get_mkldnn_enabled():
            return None
        if weight.dtype is not torch.float32 or weight.is_inference() or not weight.is_contiguous():
            return None
        made = self._packed  # read once: another thread may replace it
        if (
            made is None
            or made.weight is not weight
            or made.version != weight._version
            or made.address != weight.data_ptr()
            or (USES_MKL and made.rows != rows)
            or not torch.equal(made.sample, made.values)
        ):
            made = self._packed = _pack(weight, rows)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> PackedLinear:
        self._packed = None
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_packed': None}


def _pack(weight: Tensor, rows: int) -> _Packed:
    sample = weight.detach().view(-1)[:: weight.numel() // SAMPLES + 1]  # + 1: from several columns
    if USES_MKL:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_HINT)
    return _Packed(weight, weight._version, weight.data_ptr(), sample, sample.clone(), packed, rows)


def linear(layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    """Compute ``layer(x)`` and, with ``gelu``, the exact GELU of it, by the packed weight if there is one."""
    rows = x.numel() // layer.in_features
    made = layer.packed_weight(rows) if type(layer) is PackedLinear and rows else None
    if made is None:
        y = layer(x)
        return F.gelu(y) if gelu else y
    bias: Tensor | None = layer.bias
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores strides
    if USES_MKL:
        y = torch.ops.mkl._mkl_linear(x, made.packed, made.weight, bias, made.rows)
        return F.gelu(y) if gelu else y
    act, algorithm = ('gelu', 'none') if gelu else ('none', '')
    return torch.ops.mkldnn._linear_pointwise(x, made.packed, bias, act, [], algorithm)


def pack_linear_layers(module: nn.Module) -> None:
    """Turn each :class:`torch.nn.Linear` in ``module``, no subclass of it, into a :class:`PackedLinear`."""
    plain: list[Any] = [part for part in module.modules() if type(part) is nn.Linear]
    for part in plain:
        part.__class__ = PackedLinear  # in place: what was attached to it stays
        part._packed = None
