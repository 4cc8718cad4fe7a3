"""Spanning expanded-window attention (paper section 3.3): neighbour and distant windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def window_partition(x: Tensor, size: int, heads: int) -> Tensor:
    """View neighbour windows: adjacent tokens, as in Swin and the "block" attention of MaxViT.

    With n1 x n2 windows of side ``size``, window (i, j) holds the tokens (i * size + a, j * size + b).

    Args:
        x: Feature map of shape (B, n1 * size, n2 * size, heads * d).
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        View of shape (B, n1, n2, heads, size, size, d).
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, heads, c // heads)
    return x.permute(0, 1, 3, 5, 2, 4, 6)


def window_reverse(windows: Tensor) -> Tensor:
    """Put the windows of :func:`window_partition` back into (B, n1 * size, n2 * size, heads * d)."""
    return windows.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)


def grid_partition(x: Tensor, size: int, heads: int) -> Tensor:
    """View distant windows: strided tokens, as in the "grid" attention of MaxViT.

    With n1 x n2 windows of side ``size``, window (i, j) holds the tokens (a * n1 + i, b * n2 + j). Arguments
    and shapes are those of :func:`window_partition`.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, size, h // size, size, w // size, heads, c // heads)
    return x.permute(0, 2, 4, 5, 1, 3, 6)


def grid_reverse(windows: Tensor) -> Tensor:
    """Put the windows of :func:`grid_partition` back into (B, n1 * size, n2 * size, heads * d)."""
    return windows.permute(0, 4, 1, 5, 2, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)


def split_windows(x: Tensor, size: int, heads: int) -> Tensor:
    """Copy the windows of both kinds: (2 * B * n1 * n2, heads, size * size, d), all neighbour ones first."""
    windows = torch.stack((window_partition(x, size, heads), grid_partition(x, size, heads)))
    return windows.flatten(5, 6).flatten(0, 3)


def add_windows(windows: Tensor, size: int, n1: int, n2: int) -> Tensor:
    """Put the windows of :func:`split_windows` back and add the two kinds.

    Args:
        windows: Windows of shape (2 * B * n1 * n2, heads, size * size, d).
        size: Side of a window, in tokens.
        n1: Number of windows from top to bottom.
        n2: Number of windows from left to right.

    Returns:
        Feature map of shape (B, n1 * size, n2 * size, heads * d).
    """
    batch = windows.shape[0] // (2 * n1 * n2)
    windows = windows.unflatten(0, (2, batch, n1, n2)).unflatten(-2, (size, size))
    neighbour, distant = windows
    return window_reverse(neighbour) + grid_reverse(distant)


class SEWMHSA(nn.Module):
    """Spanning expanded-window multi-head self-attention, which also expands the channels.

    Neighbour windows (adjacent tokens) and distant windows (strided tokens) share one set of q, k and v;
    the results of the two are added. The feature map is padded at right and bottom with zeros, before q, k
    and v are computed, to a multiple of the window. Padding tokens are attended, without a mask: the
    released weights were trained so.

    Args:
        channels: Channels of the input, a multiple of ``head_dim``.
        expanded_channels: Channels of v and of the output, a multiple of ``channels // head_dim``.
        head_dim: Channels of one head of q and k.
        window_size: Side of a window, in tokens.
    """

    def __init__(self, channels: int, expanded_channels: int, head_dim: int, window_size: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.window_size = window_size
        self.qk = nn.Linear(channels, 2 * channels)
        self.v = nn.Linear(channels, expanded_channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, channels) to (B, H, W, expanded_channels)."""
        _, h, w, _ = x.shape
        size, heads = self.window_size, self.heads
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
        n1, n2 = x.shape[1] // size, x.shape[2] // size

        q, k = self.qk(x).chunk(2, dim=-1)
        v = self.act(self.v(x))
        windows = F.scaled_dot_product_attention(
            split_windows(q, size, heads),
            split_windows(k, size, heads),
            split_windows(v, size, heads),
        )
        return add_windows(windows, size, n1, n2)[:, :h, :w]
