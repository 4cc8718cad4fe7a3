"""Linear layers of a deployed network, whose weights oneDNN orders once instead of in each forward pass."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch's own compiler calls these operators; not every build of torch has them
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
SAMPLES = 16  # elements compared in each pass; more would be read from memory, not from the cache
BATCH_HINT = 49  # rows oneDNN packs for; a layout for few rows also works well for many


class _Packed(NamedTuple):
    """A packed weight, and what the weight was that it was made of."""

    weight: Tensor
    version: int
    address: int
    sample: Tensor  # a view
    values: Tensor  # its elements at that time
    packed: Tensor


class PackedLinear(nn.Linear):
    """:class:`torch.nn.Linear` that also keeps its weight in oneDNN's own order, for inference on a CPU.

    State dict, parameters and results are those of the linear layer. The packed weight is made when it is
    first needed, and again after the weight has changed: by ``load_state_dict``, in place, or as another
    tensor. Torch does not track changes in place through ``.data`` or a NumPy array. They are noticed if
    they change any of 16 elements that are compared, as all that scale or replace the whole weight do, but
    maybe not in a single row. Copies and files hold no packed weight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: _Packed | None = None

    def packed_weight(self) -> Tensor | None:
        """The packed weight, up to date, or None where the plain one has to do.

        That is so without oneDNN, in other types than float32, and for tensors made in
        :func:`torch.inference_mode`, whose changes torch does not track.
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
            or not torch.equal(made.sample, made.values)
        ):
            made = self._packed = _pack(weight)
        return made.packed

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> PackedLinear:
        self._packed = None
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_packed': None}


def _pack(weight: Tensor) -> _Packed:
    sample = weight.detach().view(-1)[:: weight.numel() // SAMPLES + 1]  # + 1: from several columns
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_HINT)
    return _Packed(weight, weight._version, weight.data_ptr(), sample, sample.clone(), packed)


def linear(layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    """Compute ``layer(x)`` and, with ``gelu``, the exact GELU of it, by the packed weight if there is one."""
    packed = layer.packed_weight() if type(layer) is PackedLinear else None
    if packed is None:
        y = layer(x)
        return F.gelu(y) if gelu else y
    bias: Tensor | None = layer.bias
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores strides
    act, algorithm = ('gelu', 'none') if gelu else ('none', '')
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, act, [], algorithm)


def pack_linear_layers(module: nn.Module) -> None:
    """Turn each :class:`torch.nn.Linear` in ``module``, no subclass of it, into a :class:`PackedLinear`."""
    plain: list[Any] = [part for part in module.modules() if type(part) is nn.Linear]
    for part in plain:
        part.__class__ = PackedLinear  # in place: what was attached to it stays
        part._packed = None
