"""Depth-wise convolution whose backward pass is fast on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)  # torch 2.1 has the latter


class DepthwiseConv2d(nn.Conv2d):
    """Depth-wise convolution with an odd kernel, "same" padding and no bias.

    The same function as :class:`torch.nn.Conv2d`. On CPUs the gradient of the input is computed as another
    forward convolution: oneDNN's own kernel for it is many times slower with channels-last maps and would
    take most of a training step.

    Args:
        channels: Channels of the input and the output.
        kernel_size: Odd side of the kernel.
        stride: 1 or more. Defaults to 1.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        traced = torch.jit.is_tracing() or is_compiling()
        if x.device.type == 'cpu' and x.requires_grad and not traced:
            return _ForwardKernelsOnly.apply(x, self.weight, self.stride[0])
        return super().forward(x)


class _ForwardKernelsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.stride, weight.shape[-1] // 2, len(weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        x, w = x.to(grad.dtype), weight.to(grad.dtype)  # they differ under autocast
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            # grad_weight alone: oneDNN's kernel for it is good
            grad_weight = torch.ops.aten.convolution_backward(
                grad, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
                [False, True, False],
            )[1]  # fmt: skip
        if ctx.needs_input_grad[0]:
            if stride > 1:
                spread = torch.zeros_like(x, memory_format=torch.channels_last)
                spread[:, :, ::stride, ::stride] = grad
                grad = spread
            grad_x = F.conv2d(grad, w.flip(2, 3), None, 1, padding, groups=groups)
        return grad_x, grad_weight, None
