"""Formats whose packages are in an environment of their own: finding it, converting and running there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emo2_mm.errors import UserError
from emo2_mm.export import environment, formats, predict, worker

LITERT = formats.FORMATS['litert']


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """No packages here, and no environment in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('EMO2_MM_LITERT_PYTHON', raising=False)
    monkeypatch.setattr(formats.Format, '_missing_here', lambda self: ['litert_torch'])


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_without_the_environment_the_commands_are_named(absent):
    with pytest.raises(UserError) as error:
        LITERT.require()
    lines = str(error.value).splitlines()
    assert lines[0] == '--format litert needs litert_torch, not installed here; run'
    assert lines[1] == '  python3 -m venv .venv-litert'
    assert lines[2].startswith('  .venv-litert/bin/python -m pip install torch==')
    assert lines[3] == '  export EMO2_MM_LITERT_PYTHON=$PWD/.venv-litert/bin/python'


def test_an_environment_is_found_by_its_variable_or_its_place(absent, monkeypatch, tmp_path):
    assert environment.find_python('litert') is None
    place = write_program(tmp_path / '.venv-litert/bin/python', 'exit 0')
    assert LITERT.python() == place
    LITERT.require()
    given = write_program(tmp_path / 'other/python', 'echo ai_edge_litert')
    monkeypatch.setenv('EMO2_MM_LITERT_PYTHON', given)
    assert LITERT.python() == given
    with pytest.raises(UserError, match=f'needs ai_edge_litert, not installed for {given}; run\n'):
        LITERT.require()


def test_a_python_that_does_not_work_is_an_error(absent, monkeypatch, tmp_path):
    monkeypatch.setenv('EMO2_MM_LITERT_PYTHON', 'gone/python')
    with pytest.raises(UserError, match='EMO2_MM_LITERT_PYTHON is gone/python: no such program'):
        LITERT.require()
    given = write_program(tmp_path / 'python', 'echo broken >&2; exit 3')
    monkeypatch.setenv('EMO2_MM_LITERT_PYTHON', given)
    with pytest.raises(UserError, match=r'python: not a Python that works \(broken\)'):
        LITERT.require()


class Network(nn.Module):
    """Operations that heads use, and sizes that are computed."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.LayerNorm(4)
        self.layer.weight.data = torch.randn(8, 3, 3, 3)[4:]  # part of a larger tensor

    def forward(self, image):
        x = self.layer(image.permute(0, 3, 1, 2).float() / 255)
        y = F.relu_(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        y = F.interpolate(y, [n * 2 for n in y.shape[2:]], mode='nearest')
        y = F.interpolate(y, scale_factor=0.5, mode='bilinear', align_corners=False)
        first, second = (x + y).chunk(2, 1)
        places = torch.arange(first.shape[3]).float() * first.shape[2] // 3
        best = torch.cat([first * places, second], 1).flatten(2).softmax(-1)
        return best, y.argmax(1).to(torch.uint8), (x - 2 * y).reshape(x.shape[0], -1)


def test_a_traced_network_becomes_one_of_torch_fx(tmp_path):
    """It computes the same, on another image; sizes are constants."""
    torch.manual_seed(0)
    network = Network().eval()
    first, second = (torch.randint(0, 256, (1, 12, 10, 3), dtype=torch.uint8) for _ in range(2))
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(network, first, check_trace=False))
        torch.jit.save(traced, str(tmp_path / 'a.pt'))
        found = worker.read_network(str(tmp_path / 'a.pt'), torch.zeros_like(first), ['a', 'b', 'c'])
        ours, theirs = found(second), network(second)
    assert list(ours) == ['a', 'b', 'c']
    for a, b in zip(ours.values(), theirs):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert all(b.storage_offset() == 0 and b.is_contiguous() for b in found.buffers())
    assert 'size' not in str(found.graph)
    assert 'arange' not in str(found.graph)


def test_an_unknown_operation_is_named(tmp_path):
    @torch.jit.script
    def choose(x):
        return (x + 1,) if bool(x.sum() > 0) else (x - 1,)

    class Chosen(nn.Module):
        def forward(self, x):
            return choose(x)

    traced = torch.jit.freeze(torch.jit.trace(Chosen().eval(), torch.ones(2)))
    torch.jit.save(traced, str(tmp_path / 'a.pt'))
    with pytest.raises(ValueError, match=r'(prim|aten)::\w+: an operation of TorchScript'):
        worker.read_network(str(tmp_path / 'a.pt'), torch.ones(2), ['a'])


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """Makes a runtime that runs a class called Doubler, in a predict.py of its own, in another process."""
    program = tmp_path / 'predict.py'
    monkeypatch.setattr(predict, '__file__', str(program))

    def make(body):
        program.write_text(
            'import os\nclass Doubler:\n'
            '    def __init__(self, folder, entry, threads):\n'
            '        print("a library prints"); self.entry = entry\n'
            f'    def __call__(self, image, names):\n        {body}\n'
            'RUNTIMES = {"double": Doubler}\n'
        )
        with environment.runtimes({'double': write_program(tmp_path / 'p', f'exec {sys.executable} "$@"')}):
            return predict.RUNTIMES['double'](tmp_path, dict(factor=2), None)

    yield make
    assert 'double' not in predict.RUNTIMES


def test_a_runtime_in_another_process(runtime):
    run = runtime('self.n = getattr(self, "n", 0) + 1; return [image * self.entry["factor"] + self.n, image]')
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    first = run(image, ['a', 'b'])
    assert np.array_equal(first[0], image * 2 + 1)
    assert np.array_equal(first[1], image)
    assert first[0].dtype == np.uint8
    run.repeat(['a', 'b'])
    assert np.array_equal(run(image, ['a', 'b'])[0], image * 2 + 3)
    process = run.process
    del run
    assert process.wait(30) == 0


def test_what_goes_wrong_in_another_process_is_told(runtime):
    run = runtime('raise RuntimeError("no such operator")')
    for _ in range(2):
        with pytest.raises(UserError, match='RuntimeError: no such operator'):
            run(np.zeros(1), ['a'])
    run = runtime('os.write(2, b"out of memory"); os._exit(9)')
    with pytest.raises(UserError, match='double ended with exit code 9: .*out of memory'):
        run(np.zeros(1), ['a'])


def test_a_conversion_that_fails_is_told(tmp_path):
    python = write_program(tmp_path / 'p', 'echo first >&2; echo the reason >&2; exit 1')
    with pytest.raises(UserError, match='litert cannot convert this model: first the reason'):
        environment.convert(python, dict(format='litert'))
    assert Path(worker.__file__).is_file()
