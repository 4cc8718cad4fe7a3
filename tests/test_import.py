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
