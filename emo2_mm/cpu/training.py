"""Convolution and what follows it in a block, as a CPU computes it: depth-wise, with its norm, with more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .inplace import SiLU
from .modes import normalises_alone, trains_on_cpu


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
        if trains_on_cpu(x) and self.bias is None:  # deployed, it has one
            return _ForwardKernelsOnly.apply(x, self.weight, self.stride[0])
        return super().forward(x)


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, of_x: bool = True, of_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a depth-wise convolution's input and weight.

    Args:
        grad: Gradient of the output, of shape (B, C, H', W').
        x: Input of shape (B, C, H, W).
        weight: Weight of shape (C, 1, k, k).
        stride: Stride of the convolution.
        of_x: Whether the gradient of ``x`` is asked for. Defaults to True.
        of_weight: Whether that of ``weight`` is. Defaults to True.
    """
    padding, groups = weight.shape[-1] // 2, len(weight)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x = grad_weight = None
    if of_weight:
        # oneDNN's kernel for it is good if it has no more to do, and in float32
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_weight = torch.ops.aten.convolution_backward(
            grad.to(wide), x.to(wide), weight.to(wide), None, [stride] * 2, [padding] * 2, [1, 1], False,
            [0, 0], groups, [False, True, False],
        )[1]  # fmt: skip
    if of_x:
        if stride > 1:
            spread = torch.zeros_like(x, dtype=grad.dtype, memory_format=torch.channels_last)
            spread[:, :, ::stride, ::stride] = grad
            grad = spread
        grad_x = F.conv2d(grad, weight.to(grad.dtype).flip(2, 3), None, 1, padding, groups=groups)
    return grad_x, grad_weight


class _ForwardKernelsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return (*depthwise_gradients(grad, x, weight, ctx.stride, *ctx.needs_input_grad[:2]), None)


ACTIVATION_GRADIENTS = {
    SiLU: torch.ops.aten.silu_backward,
    nn.GELU: torch.ops.aten.gelu_backward,
    nn.Identity: lambda grad, x: grad,
}


def can_mix_and_project(
    act: nn.Module, depthwise: nn.Module, norm: nn.Module, depthwise_act: nn.Module, project: nn.Module
) -> bool:
    """Whether :func:`mix_and_project` computes what these modules do: none of them is an adapter."""
    own = type(depthwise) is DepthwiseConv2d and type(depthwise_act) is SiLU and type(project) is nn.Linear
    exact = type(act) in ACTIVATION_GRADIENTS and getattr(act, 'approximate', 'none') == 'none'
    return own and exact and normalises_alone(norm)


def mix_and_project(
    x: Tensor, act: nn.Module, depthwise: DepthwiseConv2d, norm: nn.BatchNorm2d, project: nn.Linear
) -> Tensor:
    """Compute ``project(e + silu(norm(depthwise(e))))`` of ``e = act(x)``; at stride 2 without ``e +``.

    Autograd would keep five maps of the expanded width for the backward pass: the inputs of the activation,
    the convolution, the batch norm, the next activation and the projection. Here the first and the third are
    kept; the others follow from them by operations that cost little.

    Args:
        x: Map of shape (B, H, W, C).
        act: SiLU, GELU or identity.
        depthwise: Convolution, with a stride of 1 or 2.
        norm: Batch norm, in either mode.
        project: Linear layer from C to C' channels, without a bias.

    Returns:
        Map of shape (B, H / stride, W / stride, C').
    """
    weights = depthwise.weight, norm.weight, norm.bias, project.weight
    return _MixAndProject.apply(x, *weights, act, norm, depthwise.stride[0])


class _MixAndProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        projection: Tensor,
        act: nn.Module,
        norm: nn.BatchNorm2d,
        stride: int,
    ) -> Tensor:
        e = act(x).permute(0, 3, 1, 2)
        convolved = F.conv2d(e, kernel, None, stride, kernel.shape[-1] // 2, groups=len(kernel))
        z = F.silu(norm(convolved), inplace=True)
        if stride == 1:
            z.add_(e)
        of_batch = norm.training or norm.running_mean is None
        statistics = (None, None) if of_batch else (norm.running_mean, norm.running_var)
        ctx.save_for_backward(x, convolved, kernel, gamma, beta, projection, *statistics)
        ctx.act, ctx.eps, ctx.of_batch, ctx.stride = act, norm.eps, of_batch, stride
        return F.linear(z.permute(0, 2, 3, 1), projection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, convolved, kernel, gamma, beta, projection, *statistics = ctx.saved_tensors
        dtype = grad.dtype
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (convolved, gamma, beta) if t is not None]
            affine = inputs[1:] or (None, None)
            local = F.silu(F.batch_norm(inputs[0], *statistics, *affine, ctx.of_batch, 0.0, ctx.eps))
        with torch.no_grad():
            e = ctx.act(x).permute(0, 3, 1, 2)
            z = local + e if ctx.stride == 1 else local
            z = z.permute(0, 2, 3, 1).flatten(0, 2)
            rows = grad.flatten(0, 2)
            grad_projection = rows.t() @ z.to(dtype) if ctx.needs_input_grad[4] else None
            grad_z = (rows @ projection.to(dtype)).view(*grad.shape[:3], projection.shape[1])
            grad_z = grad_z.permute(0, 3, 1, 2)
        grad_convolved, *grad_affine = torch.autograd.grad(local, inputs, grad_z)
        grad_e, grad_kernel = depthwise_gradients(
            grad_convolved, e, kernel, ctx.stride, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        )
        if grad_e is not None:
            if ctx.stride == 1:
                grad_e = grad_e.add_(grad_z)
            grad_e = ACTIVATION_GRADIENTS[type(ctx.act)](grad_e.permute(0, 2, 3, 1), x)
        return (grad_e, grad_kernel, *(grad_affine or (None, None)), grad_projection, None, None, None)
