"""Time several functions in alternation, so that their ratios hold on a busy machine."""

from __future__ import annotations

import gc
import time
from typing import Any, Callable, Iterator, Sequence

import torch

Run = Callable[[], Any]

SECONDS = {'cpu': 8.0, 'cuda': 6.0}  # spent on one comparison where no number of rounds is given


def wait(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds(run: Run, device: str) -> float:
    wait(device)
    begun = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begun


def interleaved(runs: Sequence[Run], device: str, rounds: int | None = None) -> Iterator[list[float]]:
    """Time several things in turns (A B B A A B ...), so that a busy machine is busy for all of them.

    Each runs once untimed before it is timed, and so finds the heap and the caches as it leaves them itself:
    after something that gives its memory back to the system, anything needs fresh pages.

    Args:
        runs: What is timed.
        device: 'cpu' or 'cuda'.
        rounds: Number of rounds. Defaults to as many as fit ``SECONDS``, but from 6 to 60.

    Yields:
        The seconds that each took in one round.
    """
    for run in runs:
        run()
    once = sum(seconds(run, device) for run in runs)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds or max(6, min(60, int(SECONDS[device] / (2 * once))))):
            order = range(len(runs)) if i % 2 == 0 else reversed(range(len(runs)))
            took = {}
            for j in order:
                runs[j]()
                took[j] = seconds(runs[j], device)
            yield [took[j] for j in range(len(runs))]
    finally:
        gc.enable()
