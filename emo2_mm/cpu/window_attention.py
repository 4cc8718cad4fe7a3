"""Neighbour and distant windows without their padding, in both passes.

All padding tokens of a feature map are alike. A window with p of them attends to one, whose logit is raised
by log(p): exp(x + log p) = p exp(x). Padding queries would be cropped, so they are not computed. For the
backward pass only q, k and v of the feature map are saved, not the windows that they are partitioned into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_backward import needs_plain_backward, plain_backward


class Span(NamedTuple):
    """Windows along one axis that hold equally many valid tokens.

    Token a of window i is at ``start`` + i * ``window_step`` + a * ``token_step``.
    """

    start: int
    windows: int
    window_step: int
    tokens: int
    token_step: int


def spans(length: int, size: int, distant: bool) -> tuple[Span, ...]:
    """Divide an axis into windows of at most ``size`` tokens, adjacent or (``distant``) strided ones."""
    if distant:
        n = -(-length // size)  # windows, and the step between the tokens of one
        tokens, longer = divmod(length, n)
        found = [Span(0, longer, 1, tokens + 1, n), Span(longer, n - longer, 1, tokens, n)]
    else:
        full, rest = divmod(length, size)
        found = [Span(0, full, size, size, 1), Span(full * size, 1, size, rest, 1)]
    return tuple(span for span in found if span.windows and span.tokens)


def is_one_window(height: int, width: int, size: int) -> bool:
    """Whether one window holds the whole feature map, so that both kinds are the same."""
    return max(height, width) <= size


class Windows(NamedTuple):
    """Equally large windows, neighbour or distant ones, of a feature map with so many heads."""

    rows: Span
    columns: Span
    distant: bool
    padding: int  # tokens that each of them lacks
    heads: int

    def view(self, x: Tensor, maps: int = 1) -> Tensor:
        """View ``maps`` feature maps, concatenated to (B, H, W, maps * heads * d), by these windows.

        The view has the shape (maps, B, n1, n2, heads, rows.tokens, columns.tokens, d).
        """
        rows, columns, _, _, heads = self
        batch, _, _, channels = x.shape
        image, row, column, _ = x.stride()
        d = channels // (maps * heads)
        shape = (maps, batch, rows.windows, columns.windows, heads, rows.tokens, columns.tokens, d)
        outer = (heads * d, image, rows.window_step * row, columns.window_step * column)
        inner = (d, rows.token_step * row, columns.token_step * column, 1)
        start = x.storage_offset() + rows.start * row + columns.start * column
        return x.as_strided(shape, outer + inner, start)

    def partition(self, x: Tensor, padding: Tensor, maps: int = 1) -> Sequence[Tensor]:
        """Copy the windows of each feature map: (B * n1 * n2 * heads, tokens, d).

        Where windows have padding, one more token comes last, which stands for all of it.
        """
        x = self.view(x, maps)
        *outer, rows, columns, d = x.shape
        if not self.padding:
            return x.reshape(maps, -1, rows * columns, d).unbind()
        windows = x.new_empty(*outer, rows * columns + 1, d)
        windows[..., :-1, :].view(x.shape).copy_(x)
        windows[..., -1, :] = padding.view(maps, 1, 1, 1, -1, d)
        return windows.flatten(1, 4).unbind()

    def drop_padding(self, tokens: Tensor) -> Tensor:
        """Drop the padding token of each window."""
        return tokens[:, :-1] if self.padding else tokens

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute attention maps: (B * n1 * n2 * heads, keys, queries).

        Keys come first, for torch's softmax is faster along another axis than the last.
        """
        q = self.drop_padding(q)
        logits = torch.baddbmm(k.new_empty(1), k, q.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        if self.padding:
            logits[:, -1] += math.log(self.padding)
        return logits.softmax(1)

    def scatter(self, tokens: Tensor, x: Tensor) -> None:
        """Write (neighbour windows) or add (distant ones, which come later) valid tokens to the map ``x``."""
        x = self.view(x)
        tokens = tokens.view(x.shape)
        if self.distant:
            x.add_(tokens)
        else:
            x.copy_(tokens)

    def padding_grad(self, grad: Tensor) -> Tensor | float:
        """Sum a gradient of k or v over the padding tokens of all windows: (heads * d)."""
        return grad[:, -1].unflatten(0, (-1, self.heads)).sum(0).flatten() if self.padding else 0.0


@lru_cache(maxsize=1024)
def divide(height: int, width: int, size: int, heads: int) -> tuple[Windows, ...]:
    """Divide a feature map into its windows of each extent, all neighbour ones first."""
    return tuple(
        Windows(rows, columns, distant, size**2 - rows.tokens * columns.tokens, heads)
        for distant in ((False,) if is_one_window(height, width, size) else (False, True))
        for rows, columns in product(spans(height, size, distant), spans(width, size, distant))
    )


def attend(qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, size: int, heads: int) -> Tensor:
    """Attend in neighbour and in distant windows, and add the two.

    Args:
        qk: q and k, of shape (B, H, W, 2 * heads * d).
        v: v, of shape (B, H, W, heads * e).
        padding_qk: q and k of a padding token, of shape (2 * heads * d).
        padding_v: v of a padding token, of shape (heads * e).
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        Feature map of the shape of ``v``.
    """
    height, width = v.shape[1:3]
    qk, v = qk.contiguous(), v.contiguous()
    out = torch.empty_like(v)
    for windows in divide(height, width, size, heads):
        # free each copy before the next: cache pressure costs more than the calls here
        attention = windows.attention(*windows.partition(qk, padding_qk, 2)).to(v.dtype)
        windows.scatter(torch.bmm(attention.transpose(1, 2), *windows.partition(v, padding_v)), out)
    return out.mul_(2) if is_one_window(height, width, size) else out


def attend_padded(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, size: int, heads: int
) -> Tensor:
    """The same as :func:`attend` with padded windows, in operations that autograd and torch.func know."""
    height, width = v.shape[1:3]
    rows, columns = -height % size, -width % size
    n1, n2 = (height + rows) // size, (width + columns) // size

    def partition(x: Tensor, padding: Tensor) -> Tensor:  # (2, B, n1, n2, heads, size * size, d)
        padding = padding.to(x.dtype)
        x = torch.cat((x, padding.expand(x.shape[0], rows, width, -1)), 1)
        x = torch.cat((x, padding.expand(x.shape[0], height + rows, columns, -1)), 2)
        neighbour = x.reshape(-1, n1, size, n2, size, heads, x.shape[-1] // heads)
        distant = x.reshape(-1, size, n1, size, n2, heads, x.shape[-1] // heads)
        windows = neighbour.permute(0, 1, 3, 5, 2, 4, 6), distant.permute(0, 2, 4, 5, 1, 3, 6)
        return torch.stack(windows).flatten(5, 6)

    q, k = map(partition, qk.chunk(2, -1), padding_qk.chunk(2, -1))
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    neighbour, distant = (attention @ partition(v, padding_v)).unflatten(-2, (size, size)).unbind()
    shape = -1, n1 * size, n2 * size, v.shape[-1]
    neighbour = neighbour.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)
    return (neighbour + distant.permute(0, 4, 1, 5, 2, 3, 6).reshape(shape))[:, :height, :width]


def gelu_and_attend(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, size: int, heads: int
) -> Tensor:
    """Apply GELU to ``v`` and ``padding_v``, then :func:`attend`; saves only the arguments for backward."""
    return _GeluAndAttend.apply(qk, v, padding_qk, padding_v, size, heads)


class _GeluAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        padding_qk: Tensor,
        padding_v: Tensor,
        size: int,
        heads: int,
    ) -> Tensor:
        ctx.save_for_backward(qk, v, padding_qk, padding_v)
        ctx.setting = size, heads
        return attend(qk, F.gelu(v), padding_qk, F.gelu(padding_v), size, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, padding_qk, padding_v = tensors = ctx.saved_tensors
        size, heads = ctx.setting
        if needs_plain_backward(grad):

            def plain(qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor) -> Tensor:
                return attend_padded(qk, F.gelu(v), padding_qk, F.gelu(padding_v), size, heads)

            return (*plain_backward(plain, tensors, grad), None, None)
        qk, v = qk.contiguous(), v.contiguous()
        grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)
        grad_q, grad_k = grad_qk.chunk(2, dim=-1)
        grad_padding_qk, grad_padding_v = torch.zeros_like(padding_qk), torch.zeros_like(padding_v)
        grad_padding_k = grad_padding_qk.chunk(2)[1]  # padding queries are not computed: q has no gradient
        grad = grad.contiguous()
        h, w = v.shape[1:3]
        if is_one_window(h, w, size):
            grad = grad * 2
        activated, padding = F.gelu(v), F.gelu(padding_v)
        for windows in divide(h, w, size, heads):
            q, k = windows.partition(qk, padding_qk, 2)
            (values,) = windows.partition(activated, padding)
            attention = windows.attention(q, k).to(v.dtype)
            g = windows.view(grad).reshape(-1, attention.shape[-1], values.shape[-1])
            g_v = attention @ g
            g_attention = values @ g.transpose(1, 2)
            g_logits = torch.ops.aten._softmax_backward_data(g_attention, attention, 1, v.dtype)
            g_logits.mul_(q.shape[-1] ** -0.5)
            g_k = g_logits @ windows.drop_padding(q)
            windows.scatter(g_logits.transpose(1, 2) @ k, grad_q)
            windows.scatter(windows.drop_padding(g_k), grad_k)
            windows.scatter(windows.drop_padding(g_v), grad_v)
            grad_padding_k += windows.padding_grad(g_k)
            grad_padding_v += windows.padding_grad(g_v)
        grad_v = torch.ops.aten.gelu_backward(grad_v, v)
        grad_padding_v = torch.ops.aten.gelu_backward(grad_padding_v, padding_v)
        return grad_qk, grad_v, grad_padding_qk, grad_padding_v, None, None
