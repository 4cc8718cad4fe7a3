"""Inference on a CPU: in strips of rows that fit the cache, and in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eligibility import is_attention
from .packed_linear import linear
from .row_strips import by_strips
from .window_attention import attend


def stem(module: Any, x: Tensor) -> Tensor:
    """Map images (B, in_channels, H, W) to (B, channels, H / 2, W / 2)."""
    x = x.permute(0, 2, 3, 1)
    row_numel = x.shape[2] * module.conv.out_channels
    return by_strips(partial(_stem, module), x, 2, 4, row_numel).permute(0, 3, 1, 2)


def _stem(module: Any, x: Tensor) -> Tensor:
    x = _conv_norm_silu(x, module.conv, module.norm)
    x = _conv_norm_silu(x, module.depthwise, module.depthwise_norm)
    return module.project(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def block(module: Any, x: Tensor) -> Tensor:
    """Map (B, H, W, C) to (B, H', W', C')."""
    if is_attention(module.expand):  # needs the whole feature map
        return _block(module, x)
    conv = module.depthwise
    return by_strips(partial(_block, module), x, conv.stride[0], 2, x.shape[2] * conv.out_channels)


def _block(module: Any, x: Tensor) -> Tensor:
    parts = module._modules
    norm, expand, residual = parts['norm'], parts['expand'], module.residual
    if type(norm) is nn.LayerNorm:
        y = norm(x)
    else:
        y = x if type(norm) is nn.Identity else norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if is_attention(expand):
        y = _attend(expand, y)
    elif type(expand.act) is nn.GELU:
        y = linear(expand.linear, y, gelu=True)
    else:
        y = F.silu(linear(expand.linear, y), inplace=True)
    local = _conv_norm_silu(y, parts['depthwise'], parts['depthwise_norm'])
    y = linear(parts['project'], local.add_(y) if residual else local)
    scale = module.layer_scale
    if scale is None:
        return y.add_(x) if residual else y
    return torch.addcmul(x, y, scale) if residual else y * scale


def _attend(module: Any, x: Tensor) -> Tensor:
    h, w, size = *x.shape[1:3], module.window_size
    qk, v = linear(module.qk, x), linear(module.v, x, gelu=True)
    padding = module.v.bias
    if h % size or w % size:
        padding = F.gelu(padding)
    return attend(qk, v, module.qk.bias, padding, size, module.heads)


def _conv_norm_silu(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Compute ``silu(norm(conv(x)))`` of a (B, H, W, C) feature map."""
    x = conv(x.permute(0, 3, 1, 2))
    if type(norm) is not nn.Identity:
        x = norm(x)
    return F.silu(x, inplace=True).permute(0, 2, 3, 1)
