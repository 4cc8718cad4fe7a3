"""Operations that overwrite their input, where nobody asks for its gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SiLU(nn.SiLU):
    """SiLU of a map that nobody else uses; in place unless the map requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add ``y`` to ``x``, which nobody else uses; in place unless one of them requires a gradient."""
    return x + y if x.requires_grad or y.requires_grad else x.add_(y)
