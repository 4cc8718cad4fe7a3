"""Inference on a CPU: the same function as the modules', with as little as can be between torch's operators.

Wide maps go by strips that stay in the cache and are overwritten, and norms of large maps are folded as it
goes. No module is called: one small image takes hundreds of operators that are small themselves.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import SEWMHSA
from .deploy import with_following_norm
from .depthwise import DepthwiseConv2d
from .modes import any_module_is_hooked, has_hooks, is_watched
from .packed import HAS_ONEDNN, linear, packed_weight
from .ragged import attend

CACHE = 4 << 20  # bytes of a wide map for each thread: less costs more in halos than it saves
FOLDS_FROM = 1 << 19  # numbers in a map: over a smaller one the norm's own pass costs less than folding it


def parts_of(*modules: nn.Module) -> list[nn.Module | None]:
    """Modules and all their parts; ``torch.nn.Module.modules`` takes ten times as long."""
    parts: list[nn.Module | None] = [*modules]
    for part in parts:  # grows as it goes
        if part is not None:
            parts += part._modules.values()
    return parts


# What a pass relies on beside the class and the weights
SETTINGS = {
    nn.GELU: attrgetter('approximate'),
    nn.Conv2d: attrgetter('stride', 'padding', 'dilation', 'padding_mode'),
    DepthwiseConv2d: attrgetter('stride', 'padding', 'dilation', 'padding_mode'),
}


@lru_cache(maxsize=None)
def kind_of(cls: type) -> type:
    """A class of modules; all batch norms that compute what torch's does in eval mode are of one kind."""
    forwards = _BatchNorm.forward, nn.SyncBatchNorm.forward
    return _BatchNorm if issubclass(cls, _BatchNorm) and cls.forward in forwards else cls


def structure(parts: Sequence[nn.Module | None]) -> list[Any]:
    """What parts are and, of some, how they are set."""
    return [kind_of(type(part)) for part in parts] + [
        SETTINGS[type(part)](part) for part in parts if type(part) in SETTINGS
    ]


def need_not_be_called(parts: Sequence[nn.Module | None], built: list[Any]) -> bool:
    """Whether parts have the structure that they were built with, are not hooked, and ignore the batch."""
    if structure(parts) != built or any_module_is_hooked():
        return False
    for part in parts:
        if part.training or has_hooks(part):
            return False
    return not any(part.running_mean is None for part in parts if isinstance(part, _BatchNorm))


def by_strips(
    function: Callable[[Tensor], Tensor], x: Tensor, stride: int, halo: int, row_numel: int
) -> Tensor:
    """Apply a local function to a map strip by strip. The result is that of the whole map.

    Row i of the output may depend on the rows i * ``stride`` - ``halo`` to i * ``stride`` + ``halo`` of the
    input, with zeros beyond the border. A strip borrows these rows from its neighbours; what becomes of them
    is dropped.

    Args:
        function: Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), C').
        x: Map of shape (B, H, W, C).
        stride: Of ``function``.
        halo: Rows borrowed above and below, a multiple of ``stride``.
        row_numel: Numbers in the widest map that ``function`` makes of one row.
    """
    batch, height = x.shape[:2]
    rows = CACHE * torch.get_num_threads() // (row_numel * x.element_size())
    if rows >= batch * height:
        return function(x)
    images = max(rows // height, 1)
    step = max(rows // stride, 4) if images == 1 else height  # rows of output
    out = None
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


def normalise(x: Tensor, norm: nn.Module) -> Tensor:
    """Compute a norm of a (B, H, W, C) map."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return x if isinstance(norm, nn.Identity) else batch_norm(x.permute(0, 3, 1, 2), norm).permute(0, 2, 3, 1)


def batch_norm(x: Tensor, norm: _BatchNorm) -> Tensor:
    """Compute a batch norm of a (B, C, H, W) map in eval mode."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Compute ``silu(norm(conv(x)))`` of a (B, H, W, C) map."""
    x = x.permute(0, 3, 1, 2)
    if isinstance(norm, nn.Identity):
        x = conv._conv_forward(x, conv.weight, conv.bias)
    elif x.numel() >= FOLDS_FROM:
        x = conv._conv_forward(x, *with_following_norm(conv, norm))
    else:
        x = batch_norm(conv._conv_forward(x, conv.weight, conv.bias), norm)
    return F.silu(x, inplace=True).permute(0, 2, 3, 1)


class Inference:
    """A forward pass of an :class:`emo2_mm.EMOv2` as it was built, or deployed, all in eval mode.

    Args:
        packs: Whether to compute linear layers with packed weights.
    """

    def __init__(self, packs: bool) -> None:
        self.packs = packs

    def linear(self, x: Tensor, layer: nn.Linear, gelu: bool = False) -> Tensor:
        weight = packed_weight(layer) if self.packs else None
        if weight is not None:
            return linear(layer, weight, x, gelu)
        y = F.linear(x, layer.weight, layer.bias)
        return F.gelu(y) if gelu else y

    def attend(self, x: Tensor, attention: SEWMHSA) -> Tensor:
        h, w, size = *x.shape[1:3], attention.window_size
        qk, v = self.linear(x, attention.qk), self.linear(x, attention.v, gelu=True)
        padding = attention.v.bias
        if h % size or w % size:
            padding = F.gelu(padding)
        return attend(qk, v, attention.qk.bias, padding, size, attention.heads)

    def stem(self, x: Tensor, stem: nn.Module) -> Tensor:
        x = convolve(x, stem.conv, stem.norm)
        x = convolve(x, stem.depthwise, stem.depthwise_norm)
        project = stem.project
        if isinstance(project, nn.Identity):
            return x
        return project._conv_forward(x.permute(0, 3, 1, 2), project.weight, None).permute(0, 2, 3, 1)

    def block(self, x: Tensor, block: nn.Module) -> Tensor:
        y, expand = normalise(x, block.norm), block.expand
        if isinstance(expand, SEWMHSA):
            y = self.attend(y, expand)
        elif isinstance(expand.act, nn.GELU):
            y = self.linear(y, expand.linear, gelu=True)
        else:
            y = F.silu(self.linear(y, expand.linear), inplace=True)
        local = convolve(y, block.depthwise, block.depthwise_norm)
        y = self.linear(local.add_(y) if block.residual else local, block.project)
        if block.layer_scale is None:
            return y.add_(x) if block.residual else y
        return torch.addcmul(x, y, block.layer_scale) if block.residual else y * block.layer_scale

    def in_strips(self, x: Tensor, block: nn.Module) -> Tensor:
        if isinstance(block.expand, SEWMHSA):  # looks at the whole map
            return self.block(x, block)
        row_numel = x.shape[2] * block.depthwise.in_channels
        return by_strips(partial(self.block, block=block), x, block.stride, 2, row_numel)


def infer(backbone: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Compute the maps (B, H, W, C) of an EMOv2's stages from images of shape (B, H, W, in_channels).

    They are inference tensors, with which torch does less, unless operations are counted or the like.
    """
    watched = is_watched(x)
    run = Inference(packs=backbone.deployed and HAS_ONEDNN and x.dtype == torch.float32 and not watched)
    mode = nullcontext if watched else torch.inference_mode
    stem = backbone.stem
    with mode():
        x = by_strips(partial(run.stem, stem=stem), x, 2, 4, x.shape[2] * stem.conv.out_channels)
    for stage in backbone.stages:
        with mode():  # not around a yield, or it would hold elsewhere, too
            for block in stage:
                x = run.in_strips(x, block)
        yield x
