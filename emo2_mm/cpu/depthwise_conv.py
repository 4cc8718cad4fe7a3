"""Depth-wise convolution whose input gradient is computed by another forward convolution.

oneDNN's own kernel for that gradient is many times slower with channels-last feature maps, and would take
most of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_backward import needs_plain_backward, plain_backward


def depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve each channel by its own kernel, with "same" padding.

    Args:
        x: Feature map of shape (B, C, H, W).
        weight: Kernels of shape (C, 1, k, k), k odd.
        stride: 1 or more.

    Returns:
        Feature map of shape (B, C, ceil(H / stride), ceil(W / stride)).
    """
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))


def trainable_depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The same as :func:`depthwise_conv`, with a faster backward pass."""
    return _DepthwiseConv.apply(x, weight, stride)


def depthwise_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    needs_grad_x: bool = True,
    needs_grad_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and the weight of :func:`depthwise_conv`.

    Args:
        grad: Gradient of the output, of shape (B, C, H', W').
        x: Input of shape (B, C, H, W).
        weight: Weight of shape (C, 1, k, k).
        stride: Stride of the convolution.
        needs_grad_x: Whether the gradient of ``x`` is needed. Defaults to True.
        needs_grad_weight: Whether that of ``weight`` is. Defaults to True.
    """
    padding, groups = weight.shape[-1] // 2, len(weight)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x = grad_weight = None
    if needs_grad_weight:
        # oneDNN's weight gradient is fast only alone and in float32
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_weight = torch.ops.aten.convolution_backward(
            grad.to(wide), x.to(wide), weight.to(wide), None, [stride] * 2, [padding] * 2, [1, 1], False,
            [0, 0], groups, [False, True, False],
        )[1]  # fmt: skip
    if needs_grad_x:
        if stride > 1:
            spread = torch.zeros_like(x, dtype=grad.dtype, memory_format=torch.channels_last)
            spread[:, :, ::stride, ::stride] = grad
            grad = spread
        grad_x = F.conv2d(grad, weight.to(grad.dtype).flip(2, 3), None, 1, padding, groups=groups)
    return grad_x, grad_weight


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return depthwise_conv(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if needs_plain_backward(grad):
            return (
                *plain_backward(lambda x, w: depthwise_conv(x, w.to(x.dtype), ctx.stride), (x, weight), grad),
                None,
            )
        return (*depthwise_gradients(grad, x, weight, ctx.stride, *ctx.needs_input_grad[:2]), None)
