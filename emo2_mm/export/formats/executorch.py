"""ExecuTorch, with XNNPACK, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from .. import environment
from .base import Format, Source

INSTALL = 'torch==2.13.0 executorch==1.5.1 pillow'


def write_executorch(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.pte``."""
    source.convert_elsewhere(FORMAT, folder / 'model.pte', precision)
    return ['model.pte']


FORMAT = Format(
    'executorch',
    'ExecuTorch',
    ('torch', 'executorch', 'PIL'),
    INSTALL,
    'torch executorch',
    write_executorch,
    environment=environment.commands('executorch', INSTALL),
    limits=('images of one size, in batches of one number', 'NMS in predict.py', 'predict.py needs torch'),
)
