"""Time, memory and operators of things that run in torch, measured so that they can be compared."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from emo2_mm.analysis.timing import Run, wait

os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # or torch's profiler tells each of its stages


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
