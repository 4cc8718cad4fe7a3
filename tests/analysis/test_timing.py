"""Functions timed in alternation."""

from __future__ import annotations

import pytest

from emo2_mm.analysis import timing


def test_turns_alternate_and_belong_to_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
    runs = [lambda: calls.append('a'), lambda: [calls.append('b'), next(clock)]]
    rounds = list(timing.interleaved(runs, 'cpu', 3))
    assert ''.join(calls[4:]) == 'aabbbbaaaabb'  # each once untimed, once timed
    assert rounds == [[1, 2]] * 3


def test_rounds_follow_from_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for spent, rounds in ((0.01, 60), (0.2, 20), (100.0, 6)):
        monkeypatch.setattr(timing, 'seconds', lambda run, device, spent=spent: spent / 2)
        assert len(list(timing.interleaved([int, int], 'cpu'))) == rounds
