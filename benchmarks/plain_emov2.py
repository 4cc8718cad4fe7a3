"""EMOv2 written as plainly as the paper describes it (arXiv 2412.06674): the baseline of the benchmark.

Maps are (B, C, H, W) throughout, each step is one operation of its own, and nothing is fused, stacked,
folded or kept channels last. It is slower than :class:`emo2_mm.EMOv2` on purpose, and meant to be obviously
right. Parameters carry the same names; only 1x1 convolutions have another shape than linear layers.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emo2_mm import EMOv2

EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a (B, C, H, W) map."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        x = super().forward(x)
        return x.permute(0, 3, 1, 2).contiguous()


class DropPath(nn.Module):
    """Stochastic depth: drop whole samples at random, and scale the kept ones."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


def neighbour_windows(x: Tensor, size: int, heads: int) -> Tensor:
    """Split a map (B, C, H, W) into windows (B, n1 * n2, heads, size * size, d) of adjacent tokens."""
    b, c, h, w = x.shape
    n1, n2 = h // size, w // size
    x = x.reshape(b, heads, c // heads, n1, size, n2, size)
    x = x.permute(0, 3, 5, 1, 4, 6, 2)  # (b, n1, n2, heads, size, size, d)
    return x.reshape(b, n1 * n2, heads, size * size, c // heads)


def neighbour_map(x: Tensor, size: int, n1: int, n2: int) -> Tensor:
    """Turn :func:`neighbour_windows` round."""
    b, _, heads, _, d = x.shape
    x = x.reshape(b, n1, n2, heads, size, size, d)
    x = x.permute(0, 3, 6, 1, 4, 2, 5)  # (b, heads, d, n1, size, n2, size)
    return x.reshape(b, heads * d, n1 * size, n2 * size)


def distant_windows(x: Tensor, size: int, heads: int) -> Tensor:
    """Split a map (B, C, H, W) into windows (B, n1 * n2, heads, size * size, d) of strided tokens."""
    b, c, h, w = x.shape
    n1, n2 = h // size, w // size
    x = x.reshape(b, heads, c // heads, size, n1, size, n2)
    x = x.permute(0, 4, 6, 1, 3, 5, 2)  # (b, n1, n2, heads, size, size, d)
    return x.reshape(b, n1 * n2, heads, size * size, c // heads)


def distant_map(x: Tensor, size: int, n1: int, n2: int) -> Tensor:
    """Turn :func:`distant_windows` round."""
    b, _, heads, _, d = x.shape
    x = x.reshape(b, n1, n2, heads, size, size, d)
    x = x.permute(0, 3, 6, 4, 1, 5, 2)  # (b, heads, d, size, n1, size, n2)
    return x.reshape(b, heads * d, size * n1, size * n2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    weights = q @ k.transpose(-2, -1) * scale
    weights = weights.softmax(dim=-1)
    return weights @ v


class Attention(nn.Module):
    """Attention in neighbour and in distant windows, which share q, k and v; the two results are added."""

    def __init__(self, channels: int, expanded_channels: int, head_dim: int, window_size: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.window_size = window_size
        self.qk = nn.Conv2d(channels, 2 * channels, 1)
        self.v = nn.Conv2d(channels, expanded_channels, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        size, heads = self.window_size, self.heads
        x = F.pad(x, (0, -w % size, 0, -h % size))  # zeros at right and bottom, attended like all others
        n1, n2 = x.shape[2] // size, x.shape[3] // size

        q, k = self.qk(x).chunk(2, dim=1)
        v = self.act(self.v(x))
        neighbour = attention(*(neighbour_windows(t, size, heads) for t in (q, k, v)))
        distant = attention(*(distant_windows(t, size, heads) for t in (q, k, v)))
        x = neighbour_map(neighbour, size, n1, n2) + distant_map(distant, size, n1, n2)
        return x[:, :, :h, :w]


class Block(nn.Module):
    """Norm, expand, depth-wise convolution, project, layer scale; unless first, drop path and residual."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ratio: float,
        stage: int,
        first: bool,
        head_dim: int,
        window_size: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        mid = int(in_channels * ratio)
        attends = stage >= 2
        self.first = first
        self.norm = LayerNorm(in_channels, EPS) if attends else nn.BatchNorm2d(in_channels, EPS)
        if attends and not first:
            self.expand = Attention(in_channels, mid, head_dim, window_size)
        else:
            linear, act = nn.Conv2d(in_channels, mid, 1), nn.GELU() if attends else nn.SiLU()
            self.expand = nn.Sequential(OrderedDict(linear=linear, act=act))
        self.depthwise = nn.Conv2d(mid, mid, 5, 2 if first else 1, padding=2, groups=mid, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(mid, EPS)
        self.depthwise_act = nn.SiLU()
        self.project = nn.Conv2d(mid, out_channels, 1, bias=False)
        self.layer_scale = nn.Parameter(torch.full((out_channels,), 1e-6))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.expand(y)
        local = self.depthwise(y)
        local = self.depthwise_norm(local)
        local = self.depthwise_act(local)
        y = local if self.first else y + local
        y = self.project(y)
        y = y * self.layer_scale.reshape(1, -1, 1, 1)
        return y if self.first else x + self.drop_path(y)


class PlainEMOv2(nn.Module):
    """The baseline; the arguments are those of :class:`emo2_mm.EMOv2`."""

    def __init__(
        self,
        arch: str | dict = '5m',
        in_channels: int = 3,
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = EMOv2.arch_settings[arch] if isinstance(arch, str) else arch
        width = sizes['channels'][0] // 2
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, width, 3, 2, padding=1),
                norm=nn.BatchNorm2d(width, EPS),
                act=nn.SiLU(),
                depthwise=nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                depthwise_norm=nn.BatchNorm2d(width, EPS),
                depthwise_act=nn.SiLU(),
                project=nn.Conv2d(width, width, 1, bias=False),
            )
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(sizes['depths'])).tolist())
        self.stages = nn.ModuleList()
        for stage in range(4):
            channels, ratio = sizes['channels'][stage], sizes['expand_ratios'][stage]
            blocks = nn.Sequential()
            for i in range(sizes['depths'][stage]):
                first = i == 0
                blocks.append(
                    Block(
                        width if first else channels,
                        channels,
                        2 * ratio if first else ratio,
                        stage,
                        first,
                        sizes['head_dim'],
                        window_size,
                        next(rates),
                    )
                )
            self.stages.append(blocks)
            width = channels
        self.norm = LayerNorm(width, EPS) if final_norm else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, C, H, W) to the maps of the four stages, (B, channels, H / stride, W / stride)."""
        x = self.stem(x)
        maps = []
        for blocks in self.stages:
            x = blocks(x)
            maps.append(x)
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        return tuple(maps)


def copy_weights(emo2: EMOv2, plain: PlainEMOv2) -> None:
    """Copy the weights of an EMOv2 to the baseline: linear layers become 1x1 convolutions.

    Raises:
        RuntimeError: If the two are not of the same arch; torch names the weights.
    """
    weights = emo2.state_dict()
    plain.load_state_dict({name: w[:, :, None, None] if w.ndim == 2 else w for name, w in weights.items()})
