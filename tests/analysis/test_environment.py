"""tools/check_env.py: made-up errors, errors of small fake packages, and the environment of the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
from helpers.tiny import ROOT

from emo2_mm.analysis import environment
from emo2_mm.analysis.environment import NEEDS, Environment

TOOL = ROOT / 'tools/check_env.py'
LIBRARIES = ('mmpretrain', 'mmdet', 'mmseg')
CLASSIC = Environment(
    python='3.11.2',
    installed={'mmengine': '0.10.7', 'mmcv': '2.1.0', 'torch': '2.1.2', 'setuptools': '69.5.1'},
    present=list(NEEDS),
    modules={**dict.fromkeys(NEEDS, '1'), 'torch': '2.1.2+cu121', 'numpy': '1.26.4', 'mmcv': '2.1.0'},
    gpus={'NVIDIA H100': '9.0'},
    torch_cuda='12.1',
    torch_gpu=True,
    torch_archs=['sm_50', 'sm_75', 'sm_80', 'sm_86', 'sm_90'],
)
FORKS = CLASSIC._replace(
    python='3.12.1',
    installed={'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'torch': '2.12.0'},
    torch_cuda='13.0',
    torch_archs=['sm_75', 'sm_80', 'sm_90', 'sm_100', 'sm_120'],
)
NO_GPU = CLASSIC._replace(torch_gpu=False, gpus={})


def fail(env: Environment, name: str, error: str) -> Environment:
    """The environment with a module that fails; those that need it are not tried."""
    lost = {name}
    for other, needs in NEEDS.items():
        if lost.intersection(needs):
            lost.add(other)
    working = {key: value for key, value in env.modules.items() if key not in lost}
    return env._replace(modules=working, errors={**env.errors, name: error})


def without(env: Environment, *names: str) -> Environment:
    return env._replace(
        present=[name for name in env.present if name not in names],
        modules={key: value for key, value in env.modules.items() if key not in names},
        installed={key: value for key, value in env.installed.items() if key not in names},
    )


def install(env: Environment, **versions: str) -> Environment:
    return env._replace(installed={**env.installed, **versions})


NO_EXT = "ModuleNotFoundError: No module named 'mmcv._ext'"
NO_GL = 'ImportError: libGL.so.1: cannot open shared object file: No such file or directory'
SIZE = 'ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header'

# Environment, level of its only finding (except that on checkpoints), words of what is wrong and of the fix
ERRORS = [
    (CLASSIC._replace(python='3.7.16'), 'warning', 'Python 3.7.16', 'Python 3.8 - 3.11'),
    (CLASSIC._replace(python='3.13.0'), 'warning', 'Python 3.13.0', '3.10 - 3.12'),
    (without(CLASSIC, 'torch'), 'error', 'torch is not installed', 'requirements/classic.txt torch'),
    (without(CLASSIC, 'cv2'), 'error', 'cv2 is not installed', 'classic.txt opencv-python'),
    (without(FORKS, 'mmengine'), 'error', 'mmengine is not installed', 'onedl.txt onedl-mmengine'),
    (without(CLASSIC, 'mmcv', 'mmcv.ops'), 'error', 'mmcv is not installed', '--no-build-isolation'),
    (without(CLASSIC, 'emo2_mm'), 'error', 'emo2_mm is not installed', 'pip install . in the checkout'),
    (without(CLASSIC, *LIBRARIES), 'note', 'without mmpretrain, mmdet and mmseg', '".[det]"'),
    (without(FORKS, *LIBRARIES), 'note', 'without mmpretrain, mmdet and mmseg', 'onedl.txt onedl-mmpretrain'),
    (fail(CLASSIC, 'mmcv.ops', NO_EXT), 'error', 'operators of mmcv 2.1.0 do not work', 'MMCV_WITH_OPS=1'),
    (fail(FORKS, 'mmcv.ops', NO_EXT), 'error', 'operators of mmcv 2.1.0', 'onedl.txt onedl-mmcv --force'),
    (fail(without(CLASSIC, 'mmdet', 'mmseg'), 'mmcv.ops', NO_EXT), 'warning', 'operators', 'MMCV_WITH_OPS'),
    (fail(CLASSIC, 'mmdet', 'it crashes Python'), 'error', 'mmdet fails: it crashes', '--force-reinstall'),
    (fail(CLASSIC, 'mmseg', "No module named 'ftfy'"), 'error', 'mmseg fails', 'classic.txt ftfy'),
    (fail(CLASSIC, 'torchvision', "No module named 'PIL'"), 'error', 'torchvision fails', 'txt pillow'),
    (
        fail(CLASSIC, 'emo2_mm', 'SyntaxError: bad'),
        'error',
        'emo2_mm fails',
        'pip install . in the checkout',
    ),
    (fail(CLASSIC, 'torch', 'RuntimeError: Numpy is not available'), 'error', 'torch 2.1.2', '"numpy<2"'),
    (fail(CLASSIC, 'mmdet', SIZE), 'error', 'mmdet fails: ValueError: numpy.dtype', '"numpy<2"'),
    (fail(CLASSIC, 'cv2', NO_GL), 'error', 'cv2 fails: ImportError: libGL', 'apt-get install libgl1'),
    (CLASSIC._replace(conflicts=['a has requirement b<2']), 'warning', 'pip check: a has', 'make env'),
    (
        install(FORKS, mmcv='2.1.0'),
        'error',
        'classic packages and forks are mixed',
        'onedl-mmcv; then install',
    ),
    (install(CLASSIC, torch='2.6.0'), 'error', 'cannot resume its own checkpoints', 'onedl-* forks'),
    (install(CLASSIC, setuptools='82.0'), 'error', 'pkg_resources is missing', '"setuptools<82"'),
    (NO_GPU, 'note', 'built for CUDA 12.1, and nvidia-smi shows no GPU', 'none needed'),
    (
        CLASSIC._replace(torch_gpu=False),
        'warning',
        'cannot use NVIDIA H100 (compute capability 9.0)',
        'driver',
    ),
    (CLASSIC._replace(torch_cuda=None), 'warning', 'is built without CUDA', 'built for CUDA'),
    (CLASSIC._replace(gpus={'RTX 5090': '12.0'}), 'error', 'no kernels for RTX 5090', 'make env STACK=onedl'),
    (FORKS._replace(gpus={'V100': '7.0'}), 'error', 'no kernels for V100', 'make env STACK=classic'),
]


@pytest.mark.parametrize(('env', 'level', 'what', 'fix'), ERRORS, ids=[error[2] for error in ERRORS])
def test_error_is_reported_with_its_fix(env: Environment, level: str, what: str, fix: str) -> None:
    (found,) = (finding for finding in environment.judge(env) if 'CVE' not in finding.what)
    assert (found.level, what in found.what, fix in found.fix) == (level, True, True), found


def test_working_environments_have_no_findings() -> None:
    (unsafe,) = environment.judge(CLASSIC)
    assert unsafe.level == 'warning' and 'CVE-2026-24747' in unsafe.what
    assert environment.judge(FORKS) == []
    for archs, capability, fits in [
        (CLASSIC.torch_archs, '8.9', True),
        (CLASSIC.torch_archs, '10.0', False),
        (FORKS.torch_archs, '12.1', True),
        (['sm_90'], '8.0', False),
        (['sm_86'], '8.0', False),
    ]:
        assert environment.has_kernels(archs, capability) == fits


def test_findings_are_sorted_by_severity() -> None:
    found = environment.judge(without(install(CLASSIC, setuptools='82'), *LIBRARIES))
    assert [finding.level for finding in found] == ['error', 'warning', 'note']


PACKAGES = {
    'numpy.py': "__version__ = '2.2.6'",
    'torch.py': """
__version__ = '2.12.0+cu130'
class version: cuda, hip = '13.0', None
class cuda: is_available = staticmethod(lambda: True)
class _C: _cuda_getArchFlags = staticmethod(lambda: 'sm_75 sm_90')
class zeros:
    def __init__(self, size): pass
    def numpy(self): pass
def tensor(data, device): return data
""",
    'torchvision/__init__.py': "__version__ = '0.27.0'",
    'torchvision/ops.py': 'def nms(boxes, scores, threshold): pass',
    'cv2.py': "print('noise of a module')",
    'mmengine/__init__.py': "__version__ = '0.10.12'",
    'mmengine/runner.py': '',
    'mmengine/utils/dl_utils.py': "def collect_env(): return {'GCC': 12}",
    'mmcv/__init__.py': "__version__ = '2.3.6'",
    'mmcv/ops.py': 'def nms(boxes, scores, threshold): pass',
    'mmdet/__init__.py': '',
    'mmdet/models.py': '',
    'mmdet/datasets.py': '',
    'emo2_mm/__init__.py': '',
}


@pytest.fixture
def doctor(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Write packages, and let the tool judge an environment of these and nothing else."""

    def run(packages: dict[str, str], *args: str, gpu: str = '') -> subprocess.CompletedProcess:
        (tmp_path / 'tools').mkdir()
        shutil.copy(TOOL, tmp_path / 'tools')
        for name, text in packages.items():
            path = tmp_path / 'packages' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        analysis = tmp_path / ('packages' if packages else '') / 'emo2_mm/analysis'
        analysis.mkdir(parents=True)
        shutil.copy(environment.__file__, analysis)
        (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\necho "{gpu}"')
        (tmp_path / 'nvidia-smi').chmod(0o755)
        env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'packages'), 'PATH': str(tmp_path)}
        command = [sys.executable, '-S', str(tmp_path / 'tools/check_env.py'), *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_working_packages_give_no_findings(doctor: Callable[..., subprocess.CompletedProcess]) -> None:
    done = doctor(PACKAGES, '--json', gpu='NVIDIA H100 80GB HBM3, 9.0')
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # the noise of a module is not in it
    assert report['findings'] == []
    assert report['gpus'] == {'NVIDIA H100 80GB HBM3': '9.0'}
    assert (report['torch_archs'], report['collect_env']) == (['sm_75', 'sm_90'], {'GCC': '12'})


def test_every_missing_package_is_named(doctor: Callable[..., subprocess.CompletedProcess]) -> None:
    done = doctor({})
    assert done.returncode == 1
    for name in ('torch', 'torchvision', 'numpy', 'mmengine', 'emo2_mm'):
        assert f'error: {name} is not installed. Fix: pip install' in done.stdout
    assert 'Traceback' not in done.stderr


def test_crash_is_reported_and_the_rest_is_tried(doctor: Callable[..., subprocess.CompletedProcess]) -> None:
    broken = {
        'torchvision/__init__.py': 'import os; os.abort()',
        'mmcv/ops.py': "def nms(*args): raise RuntimeError('no kernel')",
        'mmcv-2.1.0.dist-info/METADATA': 'Name: mmcv\nVersion: 2.1.0',
        'onedl_mmcv-2.3.6.dist-info/METADATA': 'Name: onedl_mmcv\nVersion: 2.3.6',
    }
    done = doctor({**PACKAGES, **broken}, gpu='RTX 5090, 12.0')
    assert done.returncode == 1
    assert 'error: torchvision fails: it crashes Python. Fix: pip' in done.stdout
    assert 'the operators of mmcv 2.3.6 do not work with this torch: RuntimeError: no kernel' in done.stdout
    assert 'error: classic packages and forks are mixed' in done.stdout
    assert 'has no kernels for RTX 5090 (compute capability 12.0)' in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()[: len(NEEDS) + 1]]
    states = {line[0]: line[-1] for line in lines}
    assert states['mmcv'] == states['emo2_mm'] == 'works'
    assert (states['mmdet'], states['mmseg']) == ('tried', 'missing')  # "not tried"


@pytest.mark.slow
@pytest.mark.both_stacks
def test_environment_of_the_tests() -> None:
    done = subprocess.run([sys.executable, TOOL, '--json'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report['modules']) == set(NEEDS)
    assert report['modules']['torch'] == report['collect_env']['PyTorch'] == torch.__version__
    assert not torch.version.cuda or 'sm_90' in report['torch_archs']


@pytest.mark.slow
def test_fake_mmcv_before_the_real_one(tmp_path: Path) -> None:
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("__version__ = '2.1.0'")
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, TOOL], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'error: the operators of mmcv 2.1.0 do not work' in done.stdout
