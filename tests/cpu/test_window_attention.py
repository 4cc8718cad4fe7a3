"""Windows without their padding: the same function as padded windows, in value and gradient."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.attention import naive_attention
from torch import Tensor

from emo2_mm.attention import SEWMHSA
from emo2_mm.cpu.window_attention import attend_padded, divide, gelu_and_attend, spans

SIZES = [(1, 1, 3), (2, 1, 4), (1, 9, 2), (5, 7, 3), (7, 5, 1), (13, 4, 5), (6, 9, 3), (4, 4, 9), (11, 12, 7)]


def module(size: int) -> SEWMHSA:
    torch.manual_seed(0)
    return SEWMHSA(12, 30, head_dim=4, window_size=size).double()


def fast(attention: SEWMHSA) -> Callable[[Tensor], Tensor]:
    """The attention as the fast path computes it."""

    def run(x: Tensor) -> Tensor:
        qk, v, size, heads = attention.qk, attention.v, attention.window_size, attention.heads
        return gelu_and_attend(qk(x), v(x), qk.bias, v.bias, size, heads)

    return run


def image(batch: int, h: int, w: int) -> Tensor:
    return torch.randn(batch, h, w, 12, dtype=torch.double, requires_grad=True)


def results(function: Any, attention: SEWMHSA, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all weights and biases."""
    y = function(x)
    grad = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x, *attention.parameters()], grad)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('distant', [False, True])
def test_spans_hold_the_tokens_of_every_window_in_turn(distant: bool) -> None:
    for length in range(1, 41):
        for size in range(1, 13):
            n = -(-length // size)
            found = [
                [span.start + i * span.window_step + a * span.token_step for a in range(span.tokens)]
                for span in spans(length, size, distant)
                for i in range(span.windows)
            ]
            token = (lambda i, a, n=n: a * n + i) if distant else (lambda i, a, size=size: i * size + a)
            windows = [[token(i, a) for a in range(size)] for i in range(n)]
            assert found == [[t for t in window if t < length] for window in windows], (length, size)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(('h', 'w', 'size'), SIZES)
def test_equals_a_loop_over_windows(h: int, w: int, size: int, batch: int) -> None:
    """In the gradients of the biases, too, to which padded tokens contribute."""
    attention, x = module(size), image(batch, h, w)
    ours = results(fast(attention), attention, x)

    def loop(x: Tensor) -> Tensor:
        return torch.stack([naive_attention(attention, one) for one in x])

    assert_same(ours, results(loop, attention, x))


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(('h', 'w', 'size'), [*SIZES, (23, 17, 7), (30, 41, 10)])
def test_equals_padded_windows(h: int, w: int, size: int, batch: int) -> None:
    attention, x = module(size), image(batch, h, w)

    def padded(x: Tensor) -> Tensor:
        qk, v = attention.qk, attention.v
        tensors = qk(x), F.gelu(v(x)), qk.bias, F.gelu(v.bias)
        return attend_padded(*tensors, size, attention.heads)

    ours = results(fast(attention), attention, x)
    assert_same(ours, results(attention, attention, x))
    assert_same(ours, results(padded, attention, x))


def test_windows_of_many_sizes_are_forgotten() -> None:
    """A server sees any size."""
    for height in range(1, 1500):
        divide(height, 1, 7, 2)
    assert divide.cache_info().currsize == 1024


def test_nothing_comes_from_memory_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = module(4), image(2, 6, 9)
    expected = results(fast(attention), attention, x)
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr('torch.empty_like', lambda *a, **k: empty_like(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda *a, **k: new_empty(*a, **k).fill_(float('nan')))
    assert torch.empty_like(x).isnan().all()
    assert x.detach().new_empty(3).isnan().all()
    assert_same(results(fast(attention), attention, x), expected)


def test_layout_of_the_map_does_not_matter() -> None:
    attention, x = module(3), image(2, 5, 7)
    expected = results(fast(attention), attention, x)
    channels_first = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    assert not channels_first.is_contiguous()
    assert_same(results(fast(attention), attention, channels_first), expected)


def test_a_gradient_that_is_expanded() -> None:
    attention, x = module(3), image(2, 5, 7)
    y = fast(attention)(x)
    ones = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert_same(ones, torch.autograd.grad(y.sum(), x))


@pytest.mark.parametrize('size', [3, 9])
def test_a_gradient_of_another_layout(size: int) -> None:
    attention, x = module(size), image(2, 5, 7)
    y = fast(attention)(x)
    grad = torch.randn(y.permute(0, 3, 1, 2).shape, dtype=torch.double).permute(0, 2, 3, 1)
    assert not grad.is_contiguous()
    theirs = torch.autograd.grad(y, x, grad.contiguous(), retain_graph=True)
    assert_same(torch.autograd.grad(y, x, grad), theirs)


def test_backward_pass_may_run_twice() -> None:
    attention, x = module(3), image(2, 5, 7)
    y = fast(attention)(x).square().mean()
    inputs = [x, *attention.parameters()]
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, inputs)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('frozen', ['x', 'qk.weight', 'qk.bias', 'v.weight', 'v.bias', 'qk', 'v', 'both'])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    attention = module(4)
    x = image(2, 6, 5)
    named = dict(attention.named_parameters(), x=x)
    _, of_x, *of_weights = results(attention, attention, x)
    expected = dict(zip(named, [*of_weights, of_x]))
    for name, leaf in named.items():
        leaf.requires_grad_(not (name.startswith(frozen) or (frozen == 'both' and name != 'x')))
    y = fast(attention)(x)
    y.backward(torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)))
    for name, leaf in named.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-14)
        else:
            assert leaf.grad is None


def test_only_the_map_of_q_k_and_v_is_kept_for_the_backward_pass() -> None:
    attention, x = module(4), image(2, 9, 11)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        qk, v = attention.qk(x), attention.v(x)
        kept.clear()
        gelu_and_attend(qk, v, attention.qk.bias, attention.v.bias, 4, attention.heads)
    assert kept == [(2, 9, 11, 24), (2, 9, 11, 30), (24,), (30,)]


def test_layout_of_q_k_and_v_does_not_matter() -> None:
    attention, x = module(3), image(2, 5, 7)
    qk, v = attention.qk(x), attention.v(x)
    for move in (lambda t: t, lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        y = gelu_and_attend(move(qk), move(v), attention.qk.bias, attention.v.bias, 3, attention.heads)
        torch.testing.assert_close(y, attention(x), rtol=1e-10, atol=1e-12)


def test_mixed_precision() -> None:
    """As near to full precision as padded windows are; gradients in the dtype of the weights."""
    attention = module(4).float()
    x = image(2, 10, 9).detach().float().requires_grad_()
    leaves = [x, *attention.parameters()]

    def run(function: Callable[[Tensor], Tensor], narrow: bool) -> list[Tensor]:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=narrow):
            y = function(x)
        assert y.dtype == (torch.bfloat16 if narrow else torch.float32)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    def error(ours: Tensor, exact: Tensor) -> float:
        return ((ours - exact).norm() / exact.norm()).item()

    exact = run(attention, False)
    for a, b, c in zip(run(fast(attention), True), run(attention, True), exact):
        assert a.dtype == b.dtype
        assert error(a, c) < max(1.5 * error(b, c), 1e-2)
