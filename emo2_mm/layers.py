"""Layers that EMOv2 shares with other networks: batch norm by config, stochastic depth, recomputation."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

EPS = 1e-6  # of every norm in the network
BATCH_NORMS = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}


def build_batch_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    """Build the batch norm that ``norm_cfg`` names, with this network's eps unless it sets one.

    Raises:
        ValueError: If the type is unknown.
    """
    cfg = {'eps': EPS, **(norm_cfg or {})}
    kind, requires_grad = cfg.pop('type', None), cfg.pop('requires_grad', True)
    if kind not in BATCH_NORMS:
        raise ValueError(f'norm_cfg is {norm_cfg}; EMOv2 takes the types {list(BATCH_NORMS)}')
    norm = BATCH_NORMS[kind](channels, **cfg)
    return norm.requires_grad_(requires_grad)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples at random (stochastic depth, arXiv 1603.09382).

    Args:
        rate: Probability to drop a sample in training mode; kept ones are scaled by 1 / (1 - ``rate``).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return x * mask.div_(keep)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are, so that a recomputed batch does not count twice."""
    norms: list[Any] = [
        m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


def recomputed(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    """Compute a module's ``function(x)``, and again in the backward pass instead of saving activations."""
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(module)),
    )
