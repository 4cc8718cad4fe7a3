"""Fold batch norms into the weights next to them, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies its channels by, and then adds to them."""
    if norm.running_mean is None:
        raise RuntimeError(
            'a batch norm with track_running_stats=False depends on the batch: it cannot be folded'
        )
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is None:
        return scale, -norm.running_mean * scale
    scale = scale * norm.weight
    return scale, norm.bias - norm.running_mean * scale


def with_following_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what the batch norm behind it does, too."""
    scale, shift = scale_and_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)  # the norm may have more digits


@torch.no_grad()
def fold_following_norm(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Let a convolution do what the batch norm behind it does."""
    weight, bias = with_following_norm(conv, norm)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias)


@torch.no_grad()
def fold_preceding_norm(norm: nn.Module, linear: nn.Linear) -> None:
    """Let a linear layer do what the batch norm in front of it does."""
    scale, shift = scale_and_shift(norm)
    linear.bias.add_(linear.weight.to(shift.dtype) @ shift)
    linear.weight.mul_(scale)
