"""Window attention that leaves padding out: what a CPU computes instead of padded windows.

The padded tokens of a map are all alike. A window with p of them attends to one, whose logit is raised by
log(p): exp(x + log p) = p exp(x). Their own results are cropped anyway, so they ask nothing. For the backward
pass nothing is kept but q, k and v of the map, not the windows they are gathered into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Span(NamedTuple):
    """Windows along one axis that hold equally many real tokens.

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
    """Whether a map is a single window, the neighbour and the distant one at once: it is computed once."""
    return max(height, width) <= size


class Windows(NamedTuple):
    """Equally large windows, neighbour or distant ones, of a map with so many heads."""

    rows: Span
    columns: Span
    distant: bool
    padded: int  # tokens that each of them lacks
    heads: int

    def view(self, x: Tensor, maps: int = 1) -> Tensor:
        """View ``maps`` maps, side by side in one (B, H, W, maps * heads * d), by these windows.

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

    def gather(self, x: Tensor, padding: Tensor, maps: int = 1) -> tuple[Tensor, ...]:
        """Copy the windows of each map: (B * n1 * n2 * heads, tokens, d).

        Where tokens are padded, one more comes last, which stands for all of them.
        """
        x = self.view(x, maps)
        *outer, rows, columns, d = x.shape
        if not self.padded:
            return x.reshape(maps, -1, rows * columns, d).unbind()
        gathered = x.new_empty(*outer, rows * columns + 1, d)
        gathered[..., :-1, :].view(x.shape).copy_(x)
        gathered[..., -1, :] = padding.view(maps, 1, 1, 1, -1, d)
        return gathered.flatten(1, 4).unbind()

    def real(self, tokens: Tensor) -> Tensor:
        """Leave the padded token of each window out."""
        return tokens[:, :-1] if self.padded else tokens

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute attention maps: (B * n1 * n2 * heads, keys, queries).

        Keys first, for torch's softmax is faster along another axis than the last.
        """
        q = self.real(q)
        logits = torch.baddbmm(k.new_empty(1), k, q.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        if self.padded:
            logits[:, -1] += math.log(self.padded)
        return logits.softmax(1)

    def put(self, tokens: Tensor, x: Tensor) -> None:
        """Write (neighbour windows) or add (distant ones, that come later) real tokens to the map ``x``."""
        x = self.view(x)
        tokens = tokens.view(x.shape)
        if self.distant:
            x.add_(tokens)
        else:
            x.copy_(tokens)

    def padding(self, gradient: Tensor) -> Tensor | float:
        """Sum up a gradient of k or v over the padded tokens of all windows: (heads * d)."""
        return gradient[:, -1].unflatten(0, (-1, self.heads)).sum(0).flatten() if self.padded else 0.0


@lru_cache(maxsize=None)
def divide(height: int, width: int, size: int, heads: int) -> tuple[Windows, ...]:
    """Divide a map into its windows of each extent, all neighbour ones first."""
    return tuple(
        Windows(rows, columns, distant, size**2 - rows.tokens * columns.tokens, heads)
        for distant in ((False,) if is_one_window(height, width, size) else (False, True))
        for rows, columns in product(spans(height, size, distant), spans(width, size, distant))
    )


def attend(qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, size: int, heads: int) -> Tensor:
    """Attend in neighbour and in distant windows, and add the two.

    Args:
        qk: q and k in one map of shape (B, H, W, 2 * heads * d).
        v: Map of shape (B, H, W, heads * e).
        padding_qk: What a padded token has in ``qk``, of shape (2 * heads * d).
        padding_v: What it has in ``v``, of shape (heads * e).
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        Map of the shape of ``v``.
    """
    height, width = v.shape[1:3]
    out = torch.empty_like(v)
    for windows in divide(height, width, size, heads):
        # what is gathered goes at once: a map more in the cache costs more than the calls here
        attention = windows.attention(*windows.gather(qk, padding_qk, 2)).to(v.dtype)
        windows.put(torch.bmm(attention.transpose(1, 2), *windows.gather(v, padding_v)), out)
    return out.mul_(2) if is_one_window(height, width, size) else out


def activate_and_attend(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, size: int, heads: int
) -> Tensor:
    """Apply GELU to ``v`` and ``padding_v``, then :func:`attend`; of it all only the arguments are kept."""
    return _Attend.apply(qk, v, padding_qk, padding_v, size, heads)


class _Attend(torch.autograd.Function):
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, padding_qk, padding_v = ctx.saved_tensors
        size, heads = ctx.setting
        grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)
        grad_q, grad_k = grad_qk.chunk(2, dim=-1)
        grad_padding_qk, grad_padding_v = torch.zeros_like(padding_qk), torch.zeros_like(padding_v)
        grad_padding_k = grad_padding_qk.chunk(2)[1]  # padded tokens ask nothing: q has no gradient
        grad = grad.contiguous()
        if is_one_window(*v.shape[1:3], size):
            grad = grad * 2
        activated, padding = F.gelu(v), F.gelu(padding_v)
        for windows in divide(*v.shape[1:3], size, heads):
            q, k = windows.gather(qk, padding_qk, 2)
            (values,) = windows.gather(activated, padding)
            attention = windows.attention(q, k).to(v.dtype)
            g = windows.view(grad).reshape(-1, attention.shape[-1], values.shape[-1])
            g_v = attention @ g
            g_attention = values @ g.transpose(1, 2)
            g_logits = torch.ops.aten._softmax_backward_data(g_attention, attention, 1, v.dtype)
            g_logits.mul_(q.shape[-1] ** -0.5)
            g_k = g_logits @ windows.real(q)
            windows.put(g_logits.transpose(1, 2) @ k, grad_q)
            windows.put(windows.real(g_k), grad_k)
            windows.put(windows.real(g_v), grad_v)
            grad_padding_k += windows.padding(g_k)
            grad_padding_v += windows.padding(g_v)
        grad_v = torch.ops.aten.gelu_backward(grad_v, v)
        grad_padding_v = torch.ops.aten.gelu_backward(grad_padding_v, padding_v)
        return grad_qk, grad_v, grad_padding_qk, grad_padding_v, None, None
