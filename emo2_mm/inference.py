"""What inference saves: maps that are overwritten, and on a CPU maps that fit the cache."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import infers_on_cpu

CACHE = 4 << 20  # bytes of a wide map for each thread: less costs more in halos than it saves


class SiLU(nn.SiLU):
    """SiLU of a map that nobody else uses; in place unless the map requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add ``y`` to ``x``, which nobody else uses; in place unless one of them requires a gradient."""
    return x + y if x.requires_grad or y.requires_grad else x.add_(y)


def by_strips(
    function: Callable[[Tensor], Tensor], x: Tensor, stride: int, halo: int, row_numel: int
) -> Tensor:
    """Apply a local function to a map strip by strip. The result is that of the whole map.

    Row i of the output may depend on the rows i * ``stride`` - ``halo`` to i * ``stride`` + ``halo`` of the
    input, with zeros beyond the border. A strip borrows these rows from its neighbours; what becomes of them
    is dropped.

    Args:
        function: Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), C').
        x: Map of shape (B, H, W, C).
        stride: Of ``function``.
        halo: Rows borrowed above and below, a multiple of ``stride``.
        row_numel: Numbers in the widest map that ``function`` makes of one row.
    """
    if not infers_on_cpu(x):
        return function(x)
    batch, height = x.shape[:2]
    rows = CACHE * torch.get_num_threads() // (row_numel * x.element_size())
    if rows >= batch * height:
        return function(x)
    images = max(rows // height, 1)
    step = max(rows // stride, 4) if images == 1 else height  # rows of output
    out = None
    for first in range(0, batch, images):
        for top in range(0, -(-height // stride), step):
            above = max(top * stride - halo, 0)
            below = (top + step - 1) * stride + halo + 1
            strip = function(x[first : first + images, above:below])
            strip = strip[:, top - above // stride :][:, :step]
            if out is None:
                out = strip.new_empty(batch, -(-height // stride), *strip.shape[2:])
            out[first : first + images, top : top + step] = strip
    return out
