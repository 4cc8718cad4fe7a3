"""Local functions of wide feature maps, computed in strips of rows that fit the cache."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

BYTES_PER_THREAD = 4 << 20  # of a wide feature map; smaller strips recompute more halo rows than they save


def by_strips(
    function: Callable[[Tensor], Tensor], x: Tensor, stride: int, halo: int, row_numel: int
) -> Tensor:
    """Apply a local function to a feature map, strip by strip. The result is that of the whole map.

    Row i of the output may depend on the rows i * ``stride`` - ``halo`` to i * ``stride`` + ``halo`` of the
    input, with zeros beyond the border. A strip borrows these rows from its neighbours; the output rows that
    they give are dropped.

    Args:
        function: Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), C').
        x: Feature map of shape (B, H, W, C).
        stride: Of ``function``.
        halo: Rows borrowed above and below, a multiple of ``stride``.
        row_numel: Elements of the widest feature map that ``function`` makes of one row.
    """
    batch, height = x.shape[:2]
    rows = BYTES_PER_THREAD * torch.get_num_threads() // (row_numel * x.element_size())
    if rows >= batch * height:
        return function(x)
    images = max(rows // height, 1)
    step = max(rows // stride, 4) if images == 1 else height  # rows of output
    out: Any = None  # made when the shape of the first strip is known
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
