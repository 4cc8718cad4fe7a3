"""Isolate tests from each other: threads, MMEngine's global state."""

from __future__ import annotations

import os
from typing import Iterator

import pytest

# One thread per test process: the computations are small, and a process that has used several threads hangs
# when it is forked, as benchmarks/benchmark.py does. Read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import CheckpointLoader  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def no_default_scope() -> None:
    """Start each module without a default scope; MMEngine keeps the one of the last runner."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def restore_mmengine() -> Iterator[None]:
    """Restore what tools set for the whole process: the checkpoint loader and the log level."""
    schemes, level = CheckpointLoader._schemes.copy(), MMLogger.get_current_instance().level
    yield
    CheckpointLoader._schemes = schemes
    MMLogger.get_current_instance().setLevel(level)
