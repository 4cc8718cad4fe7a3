"""Whatever a user changes, outputs and gradients are those of the modules, one after the other."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from typing import Iterator

import pytest
import torch
from helpers.changes import CHANGES, FAST, INVISIBLE
from helpers.networks import MODES, Calls, assert_close, results, tiny
from torch import Tensor

from emo2_mm import EMOv2, cpu
from emo2_mm.cpu import row_strips

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BLOCKS = 8  # with the stem


@pytest.fixture(autouse=True)
def _strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small feature maps are divided into strips, too, as large ones are."""
    monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', 1 << 12)
    yield
    cpu.enable(True)


def run(
    names: tuple[str, ...], mode: str, fast: bool, size: tuple[int, int] = (41, 48), steps: int = 1
) -> dict[str, Tensor]:
    """Outputs, gradients and statistics after some steps of a changed network."""
    x = torch.rand(2, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        model: EMOv2 = tiny().double().train(mode == 'training')
        for name in names:
            torch.manual_seed(2)
            CHANGES[name](model, stack)
        cpu.enable(fast)
        return results(model, x, mode, steps)


unchanged = lru_cache(maxsize=None)(run)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', CHANGES)
def test_change(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    ours, theirs = (run((name,), mode, fast) for fast in (True, False))
    assert_close(ours, theirs)
    assert len(calls.modules) <= BLOCKS - (name not in FAST)  # or the fast path follows more than is said
    if mode == 'training':
        before = unchanged((), mode, False)
        same = before.keys() == theirs.keys() and all(
            before[n].shape == t.shape and torch.allclose(before[n], t, rtol=1e-6) for n, t in theirs.items()
        )
        assert same == (name in INVISIBLE)


@pytest.mark.parametrize('mode', MODES)
def test_nothing_is_changed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    ours = run((), mode, True, steps=2)
    assert len(calls.modules) == 2 * BLOCKS
    assert_close(ours, run((), mode, False, steps=2))
    assert len(calls.modules) == 2 * BLOCKS  # no more of them


@given(
    names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=5, unique=True),
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(33, 70), st.integers(48, 48)),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_several_changes(names: list[str], mode: str, size: tuple[int, int]) -> None:
    try:
        theirs = run(tuple(names), mode, False, size)
    except (RuntimeError, ValueError, AttributeError, TypeError, KeyError) as error:
        with pytest.raises(type(error)):  # changes that do not go together
            run(tuple(names), mode, True, size)
        return
    assert_close(run(tuple(names), mode, True, size), theirs, 1e-8)
