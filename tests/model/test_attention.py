"""Neighbour and distant windows, against a loop over windows that takes the paper at its word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emo2_mm.attention import SEWMHSA, add_windows, split_windows


def naive_attention(module: SEWMHSA, x: Tensor) -> Tensor:
    """SEW-MHSA of one image (H, W, C), one window and one head at a time."""
    h, w, c = x.shape
    size, heads = module.window_size, module.heads
    n1, n2 = -(-h // size), -(-w // size)
    padded = x.new_zeros(n1 * size, n2 * size, c)
    padded[:h, :w] = x
    q, k = (padded @ module.qk.weight.T + module.qk.bias).split(c, dim=-1)
    v = torch.nn.functional.gelu(padded @ module.v.weight.T + module.v.bias)
    d, dv = c // heads, v.shape[-1] // heads
    out = torch.zeros_like(v)
    for i in range(n1):
        for j in range(n2):
            neighbour = [(i * size + a, j * size + b) for a in range(size) for b in range(size)]
            distant = [(a * n1 + i, b * n2 + j) for a in range(size) for b in range(size)]
            for tokens in (neighbour, distant):
                rows, columns = zip(*tokens)
                for head in range(heads):
                    qs = q[rows, columns, head * d : (head + 1) * d]
                    ks = k[rows, columns, head * d : (head + 1) * d]
                    vs = v[rows, columns, head * dv : (head + 1) * dv]
                    attention = (qs @ ks.T * d**-0.5).softmax(-1)
                    out[rows, columns, head * dv : (head + 1) * dv] += attention @ vs
    return out[:h, :w]


@pytest.mark.parametrize(
    ('h', 'w', 'size'),
    [(6, 6, 3), (6, 9, 3), (5, 7, 3), (2, 1, 4), (4, 4, 4), (8, 3, 2), (7, 5, 1)],
)
def test_equals_a_loop_over_windows(h: int, w: int, size: int) -> None:
    torch.manual_seed(0)
    module = SEWMHSA(12, 30, head_dim=4, window_size=size).double()
    x = torch.randn(2, h, w, 12, dtype=torch.double)
    expected = torch.stack([naive_attention(module, image) for image in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_neighbour_windows_hold_adjacent_tokens_and_distant_ones_strided_tokens() -> None:
    tokens = torch.arange(6 * 6.0).view(1, 6, 6, 1)
    neighbour, distant = split_windows(tokens, size=3, heads=1).view(2, 4, 9)
    rows = torch.tensor([0.0, 1, 2, 6, 7, 8, 12, 13, 14])
    assert torch.equal(neighbour[0], rows)
    assert torch.equal(neighbour[3], rows + 3 * 6 + 3)
    strided = torch.tensor([0.0, 2, 4, 12, 14, 16, 24, 26, 28])
    assert torch.equal(distant[0], strided)
    assert torch.equal(distant[3], strided + 6 + 1)


def test_putting_windows_back_gives_twice_the_map() -> None:
    x = torch.randn(2, 6, 9, 8)
    windows = split_windows(x, size=3, heads=4)
    assert windows.shape == (2 * 2 * 2 * 3, 4, 9, 2)
    assert torch.equal(add_windows(windows, 3, 2, 3), 2 * x)


def test_padded_tokens_are_attended() -> None:
    """Released weights behave so: a bias alone changes the output of a map that needs padding."""
    torch.manual_seed(0)
    module = SEWMHSA(8, 16, head_dim=4, window_size=4)
    x = torch.randn(1, 3, 3, 8)
    alone = naive_attention(SEWMHSA_without_padding(module), x[0])
    assert not torch.allclose(module(x)[0], alone, atol=1e-3)


def SEWMHSA_without_padding(module: SEWMHSA) -> SEWMHSA:
    """The same weights with windows of 3, which need no padding at 3 x 3."""
    other = SEWMHSA(8, 16, head_dim=4, window_size=3)
    other.load_state_dict(module.state_dict())
    return other
