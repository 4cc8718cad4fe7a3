"""Keep test modules apart, and say from time to time how long the tests will still take."""

from __future__ import annotations

import time

import pytest
from mmengine.registry import DefaultScope

INTERVAL = 20  # seconds between two messages


@pytest.fixture(autouse=True, scope='module')
def no_default_scope() -> None:
    """MMEngine stays in the scope of the last runner; a module shall not begin in that of another."""
    DefaultScope._instance_dict.clear()


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
