"""What importing the package needs, and what it says when that is absent."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.tiny import ROOT

pytestmark = pytest.mark.both_stacks


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)


def test_needs_torch_and_mmengine_only() -> None:
    done = python(
        'import sys, emo2_mm\n'
        "print([m for m in ('mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'pycocotools') if m in sys.modules])"
    )
    assert done.stdout.strip() == '[]', done.stderr


def test_says_what_to_install_without_mmengine() -> None:
    done = python("import sys; sys.modules['mmengine'] = None; import emo2_mm")
    assert done.returncode
    assert 'emo2_mm needs mmengine, which is not installed. Run `pip install mmengine`' in done.stderr
    assert 'During handling' not in done.stderr


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name == LIBRARY:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
import emo2_mm.MODULE
"""


@pytest.mark.parametrize(
    ('module', 'library', 'extra'), [('distill', 'mmpretrain', 'cls'), ('ssd', 'mmdet', 'det')]
)
def test_says_what_to_install_without_a_library(module: str, library: str, extra: str) -> None:
    done = python(ABSENT.replace('LIBRARY', repr(library)).replace('MODULE', module))
    message = f'emo2_mm.{module} needs {library}, which is not installed; install emo2_mm[{extra}]'
    assert done.stderr.splitlines()[-1] == f'ModuleNotFoundError: {message}'
    assert 'During handling' not in done.stderr


def test_a_broken_mmengine_is_not_called_absent() -> None:
    done = python("import sys; sys.modules['addict'] = None; import emo2_mm")
    assert 'addict' in done.stderr
    assert 'is not installed. Run' not in done.stderr


def test_importing_draws_no_random_numbers() -> None:
    """Types by name are imported while a model is built: a seed gives the same weights before and after."""
    done = python(
        'import torch, mmengine\n'
        'state = torch.get_rng_state()\n'
        'import emo2_mm\n'
        'print(torch.equal(state, torch.get_rng_state()))'
    )
    assert done.stdout.strip() == 'True', done.stderr
