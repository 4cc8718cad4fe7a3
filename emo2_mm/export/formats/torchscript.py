"""TorchScript, for programs in C++ that have torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from .base import Format, Source


def write_torchscript(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.pt``, traced."""
    shutil.copyfile(source.torchscript_file(), folder / 'model.pt')
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
