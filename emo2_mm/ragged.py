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


def windows(x: Tensor, rows: Span, columns: Span, heads: int, maps: int = 1) -> Tensor:
    """View ``maps`` maps, side by side in one (B, H, W, maps * heads * d), by their windows.

    The view has the shape (maps, B, n1, n2, heads, rows.tokens, columns.tokens, d).
    """
    batch, _, _, channels = x.shape
    image, row, column, _ = x.stride()
    d = channels // (maps * heads)
    shape = (maps, batch, rows.windows, columns.windows, heads, rows.tokens, columns.tokens, d)
    outer = (heads * d, image, rows.window_step * row, columns.window_step * column)
    inner = (d, rows.token_step * row, columns.token_step * column, 1)
    return x.as_strided(shape, outer + inner, x.storage_offset() + rows.start * row + columns.start * column)


class _Windows:
    """Equally large windows of q, k and v, gathered, and their attention.

    With t tokens in a window, and u = t + 1 if there is padding (its key and value come last), else u = t:
    ``q`` (B * n1 * n2 * heads, t, d), ``k`` (..., u, d), ``v`` (..., u, e), ``attention`` (..., u, t): keys
    first, for torch's softmax is faster along another axis than the last.
    """

    def __init__(
        self,
        qk: Tensor,
        v: Tensor,
        padding_qk: Tensor,
        padding_v: Tensor,
        rows: Span,
        columns: Span,
        size: int,
        heads: int,
    ) -> None:
        self.place = (rows, columns, heads)
        self.tokens = rows.tokens * columns.tokens
        self.padded = size**2 - self.tokens
        q, self.k = self._gather(qk, padding_qk, 2)
        self.q = q[:, : self.tokens]
        (self.v,) = self._gather(v, padding_v, 1)
        self.scale = q.shape[-1] ** -0.5
        logits = torch.baddbmm(q.new_empty(1), self.k, self.q.transpose(1, 2), beta=0, alpha=self.scale)
        if self.padded:
            logits[:, -1] += math.log(self.padded)
        self.attention = logits.softmax(1).to(v.dtype)

    def _gather(self, x: Tensor, padding: Tensor, maps: int) -> Tensor:
        x = windows(x, *self.place, maps)
        if not self.padded:
            return x.reshape(maps, -1, self.tokens, x.shape[-1])
        gathered = x.new_empty(*x.shape[:5], self.tokens + 1, x.shape[-1])
        gathered[..., :-1, :].view(x.shape).copy_(x)
        gathered[..., -1, :] = padding.view(maps, 1, 1, 1, -1, x.shape[-1])
        return gathered.flatten(1, 4)

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


def attend(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, act: nn.Module, size: int, heads: int
) -> Tensor:
    """Attend in neighbour and in distant windows, and add the two.

    Args:
        qk: q and k in one map of shape (B, H, W, 2 * heads * d).
        v: v before its activation, of shape (B, H, W, heads * e).
        padding_qk: What a padded token has in ``qk``, of shape (2 * heads * d).
        padding_v: What it has in ``v``, of shape (heads * e).
        act: The activation of v: GELU.
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        Map of the shape of ``v``.
    """
    function = _Attend.apply if torch.is_grad_enabled() else _attend
    return function(qk, v, padding_qk, padding_v, act, size, heads)


def _attend(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, act: nn.Module, size: int, heads: int
) -> Tensor:
    out = torch.empty_like(v)
    for part, distant in _parts(qk, v, padding_qk, padding_v, act, size, heads):
        part.put(part.attention.transpose(1, 2) @ part.v, out, distant)
    return out.mul_(2) if is_one_window(*v.shape[1:3], size) else out


def _parts(
    qk: Tensor, v: Tensor, padding_qk: Tensor, padding_v: Tensor, act: nn.Module, size: int, heads: int
) -> Iterator[tuple[_Windows, bool]]:
    """Gather the windows of one extent after another, all neighbour ones first."""
    height, width = v.shape[1:3]
    if height % size or width % size:
        padding_v = act(padding_v)
    tensors = qk, act(v), padding_qk, padding_v
    for distant in (False,) if is_one_window(height, width, size) else (False, True):
        for rows, columns in product(spans(height, size, distant), spans(width, size, distant)):
            yield _Windows(*tensors, rows, columns, size, heads), distant


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        padding_qk: Tensor,
        padding_v: Tensor,
        act: nn.Module,
        size: int,
        heads: int,
    ) -> Tensor:
        ctx.save_for_backward(qk, v, padding_qk, padding_v)
        ctx.setting = act, size, heads
        return _attend(qk, v, padding_qk, padding_v, *ctx.setting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, padding_qk, padding_v = ctx.saved_tensors
        _, size, _ = ctx.setting
        grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)
        grad_q, grad_k = grad_qk.chunk(2, dim=-1)
        grad_padding_qk, grad_padding_v = torch.zeros_like(padding_qk), torch.zeros_like(padding_v)
        grad_padding_k = grad_padding_qk.chunk(2)[1]  # padded tokens ask nothing: q has no gradient
        grad = grad.contiguous()
        if is_one_window(*v.shape[1:3], size):
            grad = grad * 2
        for part, distant in _parts(qk, v, padding_qk, padding_v, *ctx.setting):
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
        return grad_qk, grad_v, grad_padding_qk, grad_padding_v, None, None, None
