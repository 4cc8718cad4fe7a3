"""Training on a CPU: a fast depth-wise backward pass, and blocks that save two of five wide feature maps."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise_conv import depthwise_conv, depthwise_gradients, trainable_depthwise_conv
from .eligibility import autocast_dtype, is_attention, is_autocast
from .plain_backward import needs_plain_backward, plain_backward
from .window_attention import gelu_and_attend

# forward, and the gradient of the input, given that of the output and the input
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[type, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    nn.SiLU: (F.silu, torch.ops.aten.silu_backward),
    nn.GELU: (F.gelu, torch.ops.aten.gelu_backward),
    nn.Identity: (lambda x: x, lambda grad, x: grad),
}


def stem(module: Any, x: Tensor) -> Tensor:
    """Map images (B, in_channels, H, W) to (B, channels, H / 2, W / 2)."""
    x = module.act(module.norm(module.conv(x)))
    x = trainable_depthwise_conv(x, module.depthwise.weight, module.depthwise.stride[0])
    return module.project(module.depthwise_act(module.depthwise_norm(x)))


def block(module: Any, x: Tensor) -> Tensor:
    """Map (B, H, W, C) to (B, H', W', C')."""
    norm, expand = module.norm, module.expand
    if type(norm) is nn.LayerNorm:
        y = norm(x)
    else:
        y = norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if is_attention(expand):
        qk, v = expand.qk(y), expand.v(y)
        y = gelu_and_attend(qk, v, expand.qk.bias, expand.v.bias, expand.window_size, expand.heads)
        act: type = nn.Identity
    else:
        y, act = expand.linear(y), type(expand.act)
    y = fused_tail(y, act, module.depthwise, module.depthwise_norm, module.project, module.residual)
    scale = module.layer_scale
    if not module.residual:
        return y if scale is None else y * scale
    y = module.drop_path(y)
    return x + y if scale is None else torch.addcmul(x, y, scale)


def fused_tail(
    x: Tensor, act: type, depthwise: nn.Conv2d, norm: Any, project: nn.Linear, residual: bool
) -> Tensor:
    """Compute ``project(e + silu(norm(depthwise(e))))`` of ``e = act(x)``; without a residual not ``e +``.

    Autograd would save five feature maps of the expanded width for the backward pass: the inputs of the
    activation, the convolution, the batch norm, the next activation and the projection. Here the first and
    the third are saved, and the others are computed from them again, by operations that cost little.

    Args:
        x: Feature map of shape (B, H, W, C).
        act: :class:`torch.nn.SiLU`, :class:`torch.nn.GELU` (exact) or :class:`torch.nn.Identity`.
        depthwise: Depth-wise convolution without a bias.
        norm: Batch norm, in either mode.
        project: Linear layer from C to C' channels, without a bias.
        residual: Whether ``e`` is added.

    Returns:
        Feature map of shape (B, H / stride, W / stride, C').
    """
    weights = depthwise.weight, norm.weight, norm.bias, project.weight
    return _FusedTail.apply(x, *weights, act, norm, depthwise.stride[0], residual)


class _FusedTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        projection: Tensor,
        act: type,
        norm: Any,
        stride: int,
        residual: bool,
    ) -> Tensor:
        e = ACTIVATIONS[act][0](x).permute(0, 3, 1, 2)
        convolved = depthwise_conv(e, kernel, stride)
        z = F.silu(norm(convolved), inplace=True)
        if residual:
            z.add_(e)
        of_batch = norm.training or norm.running_mean is None
        statistics = (None, None) if of_batch else (norm.running_mean, norm.running_var)
        ctx.save_for_backward(x, convolved, kernel, gamma, beta, projection, *statistics)
        ctx.act, ctx.eps, ctx.of_batch, ctx.stride, ctx.residual = act, norm.eps, of_batch, stride, residual
        ctx.autocast = partial(torch.autocast, 'cpu', autocast_dtype(), is_autocast())
        return F.linear(z.permute(0, 2, 3, 1), projection)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, convolved, kernel, gamma, beta, projection, mean, var = ctx.saved_tensors
        if needs_plain_backward(grad):
            function = partial(_plain_tail, ctx, mean, var)
            found = plain_backward(function, (x, kernel, gamma, beta, projection), grad)
            return (*found, None, None, None, None)
        dtype = grad.dtype
        act, act_backward = ACTIVATIONS[ctx.act]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (convolved, gamma, beta) if t is not None]
            affine = iter(inputs[1:])
            weight, bias = (None if t is None else next(affine) for t in (gamma, beta))
            local = F.silu(F.batch_norm(inputs[0], mean, var, weight, bias, ctx.of_batch, 0.0, ctx.eps))
        with torch.no_grad():
            e = act(x).permute(0, 3, 1, 2)
            z = local + e if ctx.residual else local
            z = z.permute(0, 2, 3, 1).flatten(0, 2)
            rows = grad.flatten(0, 2)
            grad_projection = rows.t() @ z.to(dtype) if ctx.needs_input_grad[4] else None
            grad_z = (rows @ projection.to(dtype)).view(*grad.shape[:3], projection.shape[1])
            grad_z = grad_z.permute(0, 3, 1, 2)
        grad_convolved, *grads = torch.autograd.grad(local, inputs, grad_z)
        grad_affine = iter(grads)
        grad_gamma, grad_beta = (None if t is None else next(grad_affine) for t in (gamma, beta))
        grad_e, grad_kernel = depthwise_gradients(
            grad_convolved, e, kernel, ctx.stride, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        )
        if grad_e is not None:
            if ctx.residual:
                grad_e = grad_e.add_(grad_z)
            grad_e = act_backward(grad_e.permute(0, 2, 3, 1), x)
        return (grad_e, grad_kernel, grad_gamma, grad_beta, grad_projection, None, None, None, None)


def _plain_tail(
    ctx: Any,
    mean: Tensor | None,
    var: Tensor | None,
    x: Tensor,
    kernel: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    projection: Tensor,
) -> Tensor:
    """:func:`fused_tail` in operations that autograd records; the running statistics stay as they are."""
    with ctx.autocast():
        e = ACTIVATIONS[ctx.act][0](x).permute(0, 3, 1, 2)
        z = depthwise_conv(e, kernel, ctx.stride)
        z = F.silu(F.batch_norm(z, mean, var, gamma, beta, ctx.of_batch, 0.0, ctx.eps))
        return F.linear((z + e if ctx.residual else z).permute(0, 2, 3, 1), projection)
