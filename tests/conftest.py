"""Tests keep apart, small maps take the way of large ones, and the time that is left is told."""

from __future__ import annotations

import os
import time
from typing import Iterator

import pytest

# Two processes of one thread each, for tests are many and small. Moreover, one that has computed with several
# threads hangs when it is forked, as tools/benchmark.py does. Read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import CheckpointLoader  # noqa: E402

from emo2_mm import inference  # noqa: E402

INTERVAL = 20  # seconds between two messages


@pytest.fixture(autouse=True, scope='module')
def no_default_scope() -> None:
    """MMEngine stays in the scope of the last runner; a module shall not begin in that of another."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def restore_mmengine() -> Iterator[None]:
    """Restore what tools set for their whole process: the loader of checkpoints, and the log level."""
    schemes, level = CheckpointLoader._schemes.copy(), MMLogger.get_current_instance().level
    yield
    CheckpointLoader._schemes = schemes
    MMLogger.get_current_instance().setLevel(level)


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are folded as inference goes, as with maps that would take long to test."""
    monkeypatch.setattr(inference, 'FOLDS_FROM', 0)


class TimeLeft:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.begun = self.said = time.monotonic()
        self.total = self.done = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = len(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = self.total or len(session.items)

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= INTERVAL and self.total:
            self.said = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            reporter = self.config.pluginmanager.get_plugin('terminalreporter')
            reporter.write_line(f'  {self.done} of {self.total} tests, about {left / 60:.1f} min left')


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, 'workerinput'):  # the process that reports
        config.pluginmanager.register(TimeLeft(config))
