"""Spanning expanded-window attention (paper section 3.3): neighbour and distant windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import is_hooked, runs_on_cpu
from .ragged import activate_and_attend


def split_windows(x: Tensor, size: int, heads: int) -> Tensor:
    """Gather the neighbour and the distant windows of a map.

    With n1 x n2 windows of side ``size``, the neighbour window (i, j) holds the adjacent tokens
    (i * size + a, j * size + b), the distant window (i, j) the strided tokens (a * n1 + i, b * n2 + j).

    Args:
        x: Map of shape (B, n1 * size, n2 * size, heads * d).
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        Windows of shape (2 * B * n1 * n2, heads, size * size, d), all neighbour ones first.
    """
    b, h, w, c = x.shape
    n1, n2, d = h // size, w // size, c // heads
    neighbour = x.view(b, n1, size, n2, size, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
    distant = x.view(b, size, n1, size, n2, heads, d).permute(0, 2, 4, 5, 1, 3, 6)
    # both: (B, n1, n2, heads, size, size, d)
    return torch.stack((neighbour, distant)).view(-1, heads, size * size, d)


def add_windows(windows: Tensor, size: int, n1: int, n2: int) -> Tensor:
    """Put the windows of :func:`split_windows` back into their places and add the two kinds.

    Args:
        windows: Windows of shape (2 * B * n1 * n2, heads, size * size, d).
        size: Side of a window, in tokens.
        n1: Number of windows from top to bottom.
        n2: Number of windows from left to right.

    Returns:
        Map of shape (B, n1 * size, n2 * size, heads * d).
    """
    _, heads, _, d = windows.shape
    neighbour, distant = windows.view(2, -1, n1, n2, heads, size, size, d)
    neighbour = neighbour.permute(0, 1, 4, 2, 5, 3, 6)  # (B, n1, size, n2, size, heads, d)
    distant = distant.permute(0, 4, 1, 5, 2, 3, 6)  # (B, size, n1, size, n2, heads, d)
    shape = (-1, n1 * size, n2 * size, heads * d)
    return neighbour.reshape(shape) + distant.reshape(shape)


class SEWMHSA(nn.Module):
    """Spanning expanded-window multi-head self-attention, which also expands the channels.

    Neighbour windows (adjacent tokens) and distant windows (strided tokens) share one set of q, k and v;
    the results of the two are added. The map is padded at right and bottom with zeros, before q, k and v
    are computed, to a multiple of the window. Padded tokens are attended, without a mask: the released
    weights were trained so.

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
        gelu = type(self.act) is nn.GELU and self.act.approximate == 'none'
        own = gelu and type(self.qk) is type(self.v) is nn.Linear  # not an adapter in its place
        if own and runs_on_cpu(x) and not is_hooked(*self._modules.values()):
            return activate_and_attend(self.qk(x), self.v(x), self.qk.bias, self.v.bias, size, heads)

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
