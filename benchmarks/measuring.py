"""Time, memory and operators of things that run in torch, measured so that they can be compared."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # or torch's profiler tells each of its stages

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


def in_turns(runs: Sequence[Run], device: str, rounds: int | None = None) -> Iterator[list[float]]:
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


def peak_bytes(run: Run, device: str) -> int:
    """Most memory that torch's allocator gives out at once while ``run`` runs, above what it held before."""
    wait(device)
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'trace.json')
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())['traceEvents']
    events = [e['args'] for e in events if e['name'] == '[memory]']
    # The totals begin with whatever an earlier trace saw and is still held.
    before = min(e['Total Allocated'] - max(e['Bytes'], 0) for e in events)
    return max(e['Total Allocated'] for e in events) - before


def saved_bytes(run: Run, model: nn.Module) -> int:
    """Memory that a forward pass, ``run``, keeps for the backward pass, the model's parameters aside.

    ``run`` returns its outputs, which hold the graph.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = run()
    del outputs  # until here no address was used twice
    return sum(kept.values())


def operators(run: Run, device: str, steps: int = 3) -> list[dict[str, Any]]:
    """Operators by their share of the time, largest first.

    Returns:
        Dicts of the operator's ``name``, its ``share`` of the whole time, 0 to 1, its own time in
        ``seconds`` and its ``calls`` in one step.
    """
    run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == 'cuda' else [])
    with profile(activities=activities) as trace:
        for _ in range(steps):
            run()
        wait(device)
    averages = trace.key_averages()
    own = 'self_cpu_time_total'
    if device == 'cuda':  # torch 2.1 and newer ones
        own = (
            'self_cuda_time_total'
            if hasattr(averages[0], 'self_cuda_time_total')
            else 'self_device_time_total'
        )
    total = sum(getattr(e, own) for e in averages)
    rows = [
        dict(
            name=e.key,
            share=getattr(e, own) / total,
            seconds=getattr(e, own) / 1e6 / steps,
            calls=e.count / steps,
        )
        for e in averages
    ]
    return sorted(rows, key=lambda row: -row['share'])
