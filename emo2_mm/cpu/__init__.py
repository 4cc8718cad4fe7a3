"""The stem and the blocks of EMOv2 as a CPU computes them fastest: the same functions as the modules'.

The network asks :func:`why_not` and, where that gives None, calls :func:`stem` or :func:`block` instead of
its modules. Results and gradients are the same within rounding. Nothing here imports the network. Any number
of threads may run one network: nothing that they share is written, but for caches that are replaced as a
whole.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import inference, training
from .eligibility import enable, is_enabled, needs_gradients, register, why_not
from .packed_linear import PackedLinear, pack_linear_layers

__all__ = [
    'PackedLinear', 'block', 'enable', 'is_enabled', 'pack_linear_layers', 'register', 'stem', 'why_not',
]  # fmt: skip


def stem(module: nn.Module, x: Tensor) -> Tensor:
    """Compute ``module(x)`` of the stem, where :func:`why_not` is None."""
    return (training if needs_gradients(module, x) else inference).stem(module, x)


def block(module: nn.Module, x: Tensor) -> Tensor:
    """Compute ``module(x)`` of a block, where :func:`why_not` is None."""
    return (training if needs_gradients(module, x) else inference).block(module, x)
