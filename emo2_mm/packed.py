"""Linear layers of a deployed network on a CPU: the order in which oneDNN reads a weight is made once.

In a usual linear layer each pass orders the weight anew, and writes the bias into the result before the product
is added to it. Here the product comes with its bias, and with GELU where that follows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import infers_on_cpu, is_hooked, is_watched

# torch's own compiler calls them; not every build of torch has them
HAS_ONEDNN = hasattr(torch.ops.mkldnn, '_linear_pointwise') and torch.backends.mkldnn.is_available()


class Packed:
    """The weight of a linear layer as oneDNN reads it: made when it is asked for, and anew after a change."""

    def __init__(self) -> None:
        self.made: tuple[Tensor | None, ...] = (None,) * 4

    def weight_of(self, layer: nn.Linear) -> Tensor:
        weight = layer.weight
        of, version, address, packed = self.made  # read at once: another thread may write it
        if of is not weight or version != weight._version or address != weight.data_ptr():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.made = weight, weight._version, weight.data_ptr(), packed
        return packed

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()  # copies and files hold the layer's weight, and make their own of it


def pack(layer: nn.Linear) -> None:
    """Let :func:`linear` compute this layer with a packed weight from now on; it takes as much memory again."""
    layer.packed = Packed()


def is_gelu(act: nn.Module) -> bool:
    """Whether this is the exact GELU."""
    return type(act) is nn.GELU and act.approximate == 'none'


def can_use_packed(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``layer`` is packed, computes what its weights say, and is asked for that on a CPU in float32."""
    return (
        infers_on_cpu(x)
        and 'packed' in layer.__dict__
        and HAS_ONEDNN
        and type(layer) is nn.Linear  # not parametrised
        and x.dtype == layer.weight.dtype == torch.float32
        and not layer.weight.is_inference()  # such a tensor does not tell when it changes
        and not is_watched(x)
        and not is_hooked(layer)
    )


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Compute ``layer(x)`` or, with an activation, ``act(layer(x))``, which may overwrite its input."""
    if not can_use_packed(layer, x):
        y = layer(x)
        return y if act is None else act(y)
    fused = act is not None and is_gelu(act) and not is_hooked(act)
    kind = 'gelu' if fused else 'none'
    weight = layer.packed.weight_of(layer)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, kind, [], 'none' if fused else '')
    return y if act is None or fused else act(y)
