"""Linear layers of a deployed network as oneDNN computes them on a CPU, with weights that are ordered once.

``torch.nn.functional.linear`` orders a weight anew in each pass, for the cache, and writes the bias into the
result before it adds the product. Here the product comes with its bias, and with its GELU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch's own compiler calls these operators; not every build of torch has them
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
ROWS = 49  # of a map, that a weight is ordered for: the order for few serves for many, but not the reverse


class Packed:
    """The weight of a linear layer as oneDNN orders it: made when asked for, and anew after a change."""

    def __init__(self) -> None:
        self.made: tuple[Tensor | int | None, ...] = (None,) * 4

    def weight_of(self, layer: nn.Linear) -> Tensor:
        weight = layer.weight
        of, version, address, packed = self.made  # read at once: another thread may write it
        if of is not weight or version != weight._version or address != weight.data_ptr():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            self.made = weight, weight._version, weight.data_ptr(), packed
        return packed

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()  # copies and files hold the layer's own weight


def packed_weight(layer: nn.Linear) -> Tensor | None:
    """The weight of a layer as oneDNN orders it, which is kept beside the layer's own.

    None if it is not in float32, or of those that do not tell when they change: torch's inference tensors.
    """
    if layer.weight.dtype != torch.float32 or layer.weight.is_inference():
        return None
    if 'packed' not in layer.__dict__:
        layer.packed = Packed()
    return layer.packed.weight_of(layer)


def linear(layer: nn.Linear, weight: Tensor, x: Tensor, gelu: bool = False) -> Tensor:
    """Compute ``layer(x)`` with its packed weight and, if asked for, the exact GELU of it."""
    bias = None if layer.bias is None else layer.bias.contiguous()  # or oneDNN would read other numbers
    act, algorithm = ('gelu', 'none') if gelu else ('none', '')
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], algorithm)
