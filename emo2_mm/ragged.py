"""Window attention that leaves padding out: what a CPU computes instead of padded windows.

The padded tokens of a map are all alike. A window with p of them attends to one, whose logit is raised by
log(p): exp(x + log p) = p exp(x). Their own results are cropped anyway, so they ask nothing. For the backward
pass nothing is kept but q, k and v of the map, not the windows they are gathered into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor, nn
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


@lru_cache(maxsize=None)
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


def windows(x: Tensor, rows: Span, columns: Span, heads: int) -> Tensor:
    """View a map (B, H, W, heads * d) as (B, n1, n2, heads, rows.tokens, columns.tokens, d)."""
    batch, _, _, channels = x.shape
    image, row, column, _ = x.stride()
    d = channels // heads
    shape = (batch, rows.windows, columns.windows, heads, rows.tokens, columns.tokens, d)
    inner = (d, rows.token_step * row, columns.token_step * column, 1)
    strides = (image, rows.window_step * row, columns.window_step * column, *inner)
    return x.as_strided(shape, strides, x.storage_offset() + rows.start * row + columns.start * column)


class _Windows:
    """Equally large windows of q, k and v, gathered, and their attention.

    With t tokens in a window, and u = t + 1 if there is padding (its key and value come last), else u = t:
    ``q`` (B * n1 * n2 * heads, t, d), ``k`` (..., u, d), ``v`` (..., u, e), ``attention`` (..., u, t): keys
    first, for torch's softmax is faster along another axis than the last.
    """

    def __init__(self, tensors: tuple[Tensor, ...], rows: Span, columns: Span, size: int, heads: int) -> None:
        q, k, v, padding_k, padding_v = tensors
        self.place = (rows, columns, heads)
        self.tokens = rows.tokens * columns.tokens
        self.padded = size**2 - self.tokens
        self.q = windows(q, *self.place).reshape(-1, self.tokens, q.shape[-1] // heads)
        self.k = self._gather(k, padding_k)
        self.v = self._gather(v, padding_v)
        self.scale = self.q.shape[-1] ** -0.5
        logits = torch.baddbmm(q.new_empty(1), self.k, self.q.transpose(1, 2), beta=0, alpha=self.scale)
        if self.padded:
            logits[:, -1] += math.log(self.padded)
        self.attention = logits.softmax(1).to(v.dtype)

    def _gather(self, x: Tensor, padding: Tensor) -> Tensor:
        x = windows(x, *self.place)
        if not self.padded:
            return x.reshape(-1, self.tokens, x.shape[-1])
        gathered = x.new_empty(*x.shape[:4], self.tokens + 1, x.shape[-1])
        gathered[..., :-1, :].view(x.shape).copy_(x)
        gathered[..., -1, :] = padding.view(-1, x.shape[-1])
        return gathered.flatten(0, 3)

    def put(self, values: Tensor, x: Tensor, distant: bool) -> None:
        """Write (neighbour windows) or add (distant ones, that come later) tokens to the map ``x``."""
        place = windows(x, *self.place)
        values = values[:, : self.tokens].view(place.shape)
        if distant:
            place.add_(values)
        else:
            place.copy_(values)

    def padding(self, gradient: Tensor) -> Tensor | float:
        """Sum up a gradient of k or v over the padded tokens of all windows: (heads * d)."""
        heads = self.place[-1]
        return gradient[:, -1].unflatten(0, (-1, heads)).sum(0).flatten() if self.padded else 0.0


class Attend(torch.autograd.Function):
    """Attend in neighbour and in distant windows, and add the two.

    ``apply`` takes q and k in one map of shape (B, H, W, 2 * heads * d); v before its activation, of shape
    (B, H, W, heads * e); k and v of a padded token, of shapes (heads * d) and (heads * e); the activation
    (GELU); the side of a window and the number of heads. It gives a map of the shape of v.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        padding_k: Tensor,
        padding_v: Tensor,
        act: nn.Module,
        size: int,
        heads: int,
    ) -> Tensor:
        ctx.save_for_backward(qk, v, padding_k, padding_v)
        ctx.act, ctx.size, ctx.heads = act, size, heads
        out = torch.empty_like(v)
        for part, distant in Attend.parts(ctx, qk, v, padding_k, padding_v):
            part.put(part.attention.transpose(1, 2) @ part.v, out, distant)
        return out.mul_(2) if is_one_window(*v.shape[1:3], size) else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, padding_k, padding_v = ctx.saved_tensors
        grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)
        grad_q, grad_k = grad_qk.chunk(2, dim=-1)
        grad_padding_k, grad_padding_v = torch.zeros_like(padding_k), torch.zeros_like(padding_v)
        grad = grad.contiguous()
        if is_one_window(*v.shape[1:3], ctx.size):
            grad = grad * 2
        for part, distant in Attend.parts(ctx, qk, v, padding_k, padding_v):
            g = windows(grad, *part.place).reshape(-1, part.tokens, part.v.shape[-1])
            g_v = part.attention @ g
            g_attention = part.v @ g.transpose(1, 2)
            g_logits = torch.ops.aten._softmax_backward_data(g_attention, part.attention, 1, v.dtype)
            g_logits.mul_(part.scale)
            g_k = g_logits @ part.q
            part.put(g_logits.transpose(1, 2) @ part.k, grad_q, distant)
            part.put(g_k, grad_k, distant)
            part.put(g_v, grad_v, distant)
            grad_padding_k += part.padding(g_k)
            grad_padding_v += part.padding(g_v)
        grad_v = torch.ops.aten.gelu_backward(grad_v, v)
        grad_padding_v = torch.ops.aten.gelu_backward(grad_padding_v, padding_v)
        return grad_qk, grad_v, grad_padding_k, grad_padding_v, None, None, None

    @staticmethod
    def parts(
        ctx: Any, qk: Tensor, v: Tensor, padding_k: Tensor, padding_v: Tensor
    ) -> Iterator[tuple[_Windows, bool]]:
        """Gather the windows of one extent after another, all neighbour ones first."""
        tensors = (*qk.chunk(2, dim=-1), ctx.act(v), padding_k, ctx.act(padding_v))
        for distant in (False,) if is_one_window(*v.shape[1:3], ctx.size) else (False, True):
            h, w = (spans(length, ctx.size, distant) for length in v.shape[1:3])
            for rows, columns in product(h, w):
                yield _Windows(tensors, rows, columns, ctx.size, ctx.heads), distant
