"""Neighbour and distant windows, against a loop over windows that takes the paper at its word."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import naive_attention

from emo2_mm.attention import (
    SEWMHSA,
    add_windows,
    grid_partition,
    grid_reverse,
    split_windows,
    window_partition,
    window_reverse,
)


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


def test_reverse_undoes_partition() -> None:
    x = torch.randn(2, 6, 9, 8)
    for partition, reverse in ((window_partition, window_reverse), (grid_partition, grid_reverse)):
        windows = partition(x, size=3, heads=4)
        assert windows.shape == (2, 2, 3, 4, 3, 3, 2)
        assert torch.equal(reverse(windows), x)
    windows = split_windows(x, size=3, heads=4)
    assert windows.shape == (2 * 2 * 2 * 3, 4, 9, 2)
    assert torch.equal(add_windows(windows, 3, 2, 3), 2 * x)
