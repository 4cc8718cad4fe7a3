"""Run a tool in this process on the tiny data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import CONFIGS, call_tool, write_config, write_data
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from emo2_mm.engine import evaluation, training
from emo2_mm.engine.runner import build_runner


@pytest.fixture
def on_cpu(monkeypatch):
    """Find no GPU."""
    for module in ('runner', 'training', 'evaluation'):
        monkeypatch.setattr(f'emo2_mm.engine.{module}.get_device', lambda: 'cpu')


@pytest.fixture
def call(tmp_path, monkeypatch, on_cpu):
    """Run the main function of a tool on the CPU, in the test's folder, and give its runner."""
    monkeypatch.chdir(tmp_path)
    runners = []

    def call(tool: str, *arguments: Any, hooks: tuple[Hook, ...] = ()) -> Runner:
        def build(cfg: Config) -> Runner:
            # MMEngine keeps loggers and visualizers by name, and names runs by the second
            cfg.experiment_name = f'{tmp_path}-{len(runners)}'
            runners.append(build_runner(cfg))
            for hook in hooks:
                runners[-1].register_hook(hook, priority='LOWEST')
            return runners[-1]

        for module in (training, evaluation):
            monkeypatch.setattr(module, 'build_runner', build)
        call_tool(tool, *arguments)
        return runners[-1]

    return call


@pytest.fixture
def tiny(tmp_path):
    """Write the tiny data and a tiny config of a code base, which may gain some lines."""
    write_data(tmp_path)

    def tiny(scope: str, more: str = '') -> Path:
        pytest.importorskip(scope)
        return write_config(tmp_path, CONFIGS[scope] + more)

    return tiny
