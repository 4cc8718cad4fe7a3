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
    """Time several functions in alternation (A B B A A B ...), so that load on the machine affects all.

    Each runs once untimed right before it is timed, so that it finds heap and caches in the state that it
    leaves: after a function that returns memory to the system, the next one pays for page faults.

    Args:
        runs: Functions to time.
        device: 'cpu' or 'cuda'.
        rounds: Number of rounds. Defaults to as many as fit into ``SECONDS``, between 6 and 60.

    Yields:
        Seconds of each function in one round.
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
