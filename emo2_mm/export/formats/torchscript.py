"""TorchScript, for programs in C++ that have torch."""

from __future__ import annotations

from pathlib import Path

import torch

from .base import Format, Source


def write_torchscript(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.pt``, traced."""
    with torch.no_grad():
        traced = torch.jit.trace(source.network, source.example, check_trace=False)
    traced = torch.jit.freeze(traced.eval())
    torch.jit.save(traced, str(folder / 'model.pt'))
    return ['model.pt']


FORMAT = Format(
    'torchscript',
    'TorchScript',
    ('torch',),
    'torch',
    'torch',
    write_torchscript,
    free_batch=True,
    limits=('predict.py needs torch', 'NMS in predict.py'),
)
