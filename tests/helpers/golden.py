"""Recorded behaviour of the published network, and the weights and inputs it was recorded on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / 'data'


def golden_cases() -> list[dict[str, Any]]:
    """Recorded outputs and gradients, one dict a case."""
    return json.loads((DATA / 'golden_cases.json').read_text())['cases']


def official_shapes(arch: str) -> dict[str, list[int]]:
    """Names and shapes of a published classification state dict."""
    return json.loads((DATA / 'official_keys.json').read_text())[arch]


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def generated_tensor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The weight called `name` (a published name) that the recordings were made with."""
    if name.endswith('num_batches_tracked'):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    n = np.random.RandomState((crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(tuple(shape))
    if name.endswith('running_mean'):
        n = 0.1 * n
    elif name.endswith('running_var'):
        n = 1 + 0.2 * abs(n)
    elif name.endswith('ls.gamma'):
        n = 0.5 + 0.1 * n
    elif name.endswith('weight') and len(shape) == 1:
        n = 1 + 0.1 * n
    elif name.endswith('bias'):
        n = 0.1 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def generated_state_dict(arch: str, seed: int) -> dict[str, Tensor]:
    """A whole published-style classification state dict."""
    return {k: generated_tensor(k, v, seed) for k, v in official_shapes(arch).items()}


def relative_error(tensor: Tensor, record: dict[str, Any]) -> float:
    """Relative error at the recorded positions; the shape must be the recorded one."""
    assert list(tensor.shape) == record['shape']
    flat = tensor.detach().double().flatten()
    positions = torch.linspace(0, flat.numel() - 1, 64).long()
    recorded = torch.tensor(record['values'], dtype=torch.float64)
    return ((flat[positions] - recorded).norm() / recorded.norm()).item()
