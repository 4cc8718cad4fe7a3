"""tools/check_env.py: faults that are made up, faults of small fake packages, and the environment at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.tiny import ROOT

from emo2_mm.analysis import environment

TOOL = ROOT / 'tools' / 'check_env.py'

BASES = {'mmpretrain': '1.2.0', 'mmdet': '3.3.0', 'mmseg': '1.2.2'}
CLASSIC = environment.Environment(
    python='3.11.2',
    installed={
        **{'mmengine': '0.10.7', 'mmcv': '2.1.0', 'opencv-python': '4.10.0.84', 'torchvision': '0.16.2'},
        **{'mmpretrain': '1.2.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2', 'torch': '2.1.2'},
    },
    present=list(environment.NEEDS),
    modules={
        **{'numpy': '1.26.4', 'torch': '2.1.2+cu121', 'torchvision': '0.16.2+cu121', 'cv2': '4.10.0'},
        **{'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmcv.ops': '', 'emo2_mm': '0.1.0', 'pkg_resources': ''},
        **BASES,
    },
    limits={
        'mmdet': [('mmcv', '2.0.0rc4', '2.2.0'), ('mmengine', '0.7.1', '1.0.0')],
        'mmseg': [('MMCV', '2.0.0rc4', '2.2.0'), ('MMENGINE', '0.5.0', '1.0.0')],
        'mmpretrain': [('mmcv', '2.0.0', '2.4.0'), ('mmengine', '0.8.3', '1.0.0')],
    },
    torchvision_wants='2.1.2',
    torch_cuda='12.1',
    torch_gpu=True,
    gpus=['NVIDIA H100'],
    engine_resumes=False,
)
FORKS = CLASSIC._replace(
    python='3.12.1',
    installed={
        **{'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'opencv-python': '5.0', 'torch': '2.11.0'},
        **{'onedl-mmdetection': '3.5.1', 'onedl-mmsegmentation': '1.4.2', 'onedl-mmpretrain': '1.3.6'},
    },
    modules={**CLASSIC.modules, 'numpy': '2.2.6', 'torch': '2.11.0+cu130', 'torchvision': '0.26.0+cu130'},
    limits={'mmdet': [], 'mmseg': [], 'mmpretrain': CLASSIC.limits['mmpretrain']},
    torchvision_wants='2.11.0',
    engine_resumes=True,
)


def fail(env, name, error):
    """The environment with a module that fails, and so what needs it untried."""
    lost = {name}
    for other, needs in environment.NEEDS.items():
        if lost.intersection(needs):
            lost.add(other)
    working = {key: value for key, value in env.modules.items() if key not in lost}
    return env._replace(modules=working, errors={**env.errors, name: error})


def without(env, *names):
    return env._replace(
        present=[name for name in env.present if name not in names],
        modules={key: value for key, value in env.modules.items() if key not in names},
        installed={key: value for key, value in env.installed.items() if key not in names},
    )


def version(env, name, number):
    return env._replace(modules={**env.modules, name: number})


def install(env, name):
    return env._replace(installed={**env.installed, name: '1.0'})


NO_EXT = "ModuleNotFoundError: No module named 'mmcv._ext'"
SYMBOL = (
    'ImportError: mmcv/_ext.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c1017RegisterOperators'
)
NO_NMS = 'RuntimeError: operator torchvision::nms does not exist'
NO_GL = 'ImportError: libGL.so.1: cannot open shared object file: No such file or directory'
SIZE = 'ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header'
REFUSED = 'AssertionError: MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'

NEW_MMCV = fail(version(CLASSIC, 'mmcv', '2.2.0'), 'mmdet', REFUSED)
OLD_ENGINE = fail(
    version(CLASSIC, 'mmengine', '0.6.0'), 'mmdet', 'AssertionError: MMEngine==0.6.0 is incompatible'
)
NEW_NUMPY = version(CLASSIC, 'numpy', '2.2.6')
OTHER_TORCH = CLASSIC._replace(torchvision_wants='')
NO_RESOURCES = without(CLASSIC, 'pkg_resources')._replace(use_pkg_resources=['mmengine'])
NO_GPU = CLASSIC._replace(torch_gpu=False, gpus=[])

# Environment, level of its only finding (but for loading holes), words of what is wrong and of the cure.
FAULTS = [
    (CLASSIC._replace(python='3.7.16'), 'error', 'Python 3.7.16', 'Python 3.8 - 3.11'),
    (CLASSIC._replace(python='3.13.0'), 'warning', 'Python 3.13.0', '3.10 - 3.12'),
    (without(CLASSIC, 'torch'), 'error', 'torch is not installed', 'requirements/classic.txt torch'),
    (without(CLASSIC, 'cv2', 'opencv-python'), 'error', 'cv2 is not installed', 'txt opencv-python'),
    (without(CLASSIC, 'mmengine'), 'error', 'mmengine is not installed', 'requirements/classic.txt mmengine'),
    (
        without(FORKS, 'mmengine'),
        'error',
        'mmengine is not installed',
        'pip install -c requirements/onedl.txt onedl-mmengine',
    ),
    (without(CLASSIC, 'mmcv', 'mmcv.ops'), 'error', 'mmcv is not installed', '--no-build-isolation'),
    (without(CLASSIC, 'emo2_mm'), 'error', 'emo2_mm is not installed', 'pip install . in the folder'),
    (without(CLASSIC, *BASES), 'note', 'without mmpretrain, mmdet and mmseg', '".[det]"'),
    (without(FORKS, *BASES), 'note', 'without mmpretrain, mmdet and mmseg', 'onedl.txt onedl-mmpretrain'),
    (
        fail(CLASSIC, 'mmcv.ops', NO_EXT),
        'error',
        'mmcv 2.1.0 has no compiled operators',
        'uninstall -y mmcv;',
    ),
    (
        fail(FORKS, 'mmcv.ops', NO_EXT),
        'error',
        'no compiled operators',
        'requirements/onedl.txt onedl-mmcv --no-build-isolation',
    ),
    (
        fail(CLASSIC, 'mmcv.ops', SYMBOL),
        'error',
        'do not work with this torch: ImportError',
        'MMCV_WITH_OPS=1',
    ),
    (fail(without(CLASSIC, 'mmdet', 'mmseg'), 'mmcv.ops', NO_EXT), 'warning', 'no compiled', 'MMCV_WITH_OPS'),
    (NEW_MMCV, 'error', 'mmdet 3.3.0 takes mmcv >= 2.0.0rc4, < 2.2.0, not 2.2.0', 'MMCV_WITH_OPS=1'),
    (OLD_ENGINE, 'error', 'mmdet 3.3.0 takes mmengine >= 0.7.1, < 1.0.0, not 0.6.0', 'classic.txt mmengine'),
    (
        fail(CLASSIC, 'mmdet', 'it crashes Python'),
        'error',
        'mmdet 3.3.0 fails: it cra',
        '--no-deps mmdet==3.3.0',
    ),
    (
        fail(CLASSIC, 'emo2_mm', 'SyntaxError: bad'),
        'error',
        'emo2_mm fails: SyntaxError',
        'pip install . in the folder',
    ),
    (fail(CLASSIC, 'mmseg', "No module named 'ftfy'"), 'error', 'mmseg 1.2.2 fails', 'classic.txt ftfy'),
    (
        fail(CLASSIC, 'torchvision', "No module named 'PIL'"),
        'error',
        'torchvision 0.16',
        'classic.txt pillow',
    ),
    (
        fail(CLASSIC, 'torchvision', NO_NMS),
        'error',
        'does not fit torch 2.1.2: RuntimeError',
        'from one index',
    ),
    (CLASSIC._replace(torchvision_wants='2.2.0'), 'warning', 'built for 2.2.0', 'torch==2.1.2 torchvision,'),
    (version(OTHER_TORCH, 'torch', '2.0.1'), 'error', 'torch 2.0.1 is older', 'txt torch torchvision'),
    (version(OTHER_TORCH, 'torch', '2.6.0'), 'error', 'cannot resume its own checkpoints', 'onedl-* forks'),
    (
        NEW_NUMPY._replace(torch_numpy=False),
        'error',
        'cannot use numpy 2.2.6',
        '"numpy<2" "opencv-python<4.11"',
    ),
    (fail(NEW_NUMPY, 'mmdet', SIZE), 'error', 'mmdet was built for numpy 1, not 2.2.6', '"numpy<2"'),
    (
        install(CLASSIC, 'mmcv-lite'),
        'warning',
        'mmcv and mmcv-lite overwrite',
        'uninstall -y mmcv mmcv-lite;',
    ),
    (
        install(CLASSIC, 'opencv-python-headless'),
        'warning',
        'opencv-python and opencv-python-headl',
        'one of',
    ),
    (install(FORKS, 'mmcv'), 'error', 'classic packages and forks are mixed', 'install all of one kind'),
    (fail(CLASSIC, 'cv2', NO_GL), 'error', 'cv2 needs libGL.so.1', 'apt-get install libgl1 libglib2.0-0'),
    (NO_RESOURCES, 'error', "missing, which mmengine imports, for _base_ = 'mmdet::", '"setuptools<82"'),
    (NO_GPU, 'note', 'built for CUDA 12.1, and there is no GPU', 'none needed'),
    (NO_GPU._replace(gpus=['NVIDIA H100']), 'warning', 'cannot use this GPU: NVIDIA H100', 'CUDA 12.1'),
    (NO_GPU._replace(torch_cuda=None, gpus=['NVIDIA H100']), 'warning', 'without CUDA', 'built for CUDA'),
]


@pytest.mark.parametrize(('env', 'level', 'what', 'cure'), FAULTS, ids=[fault[2] for fault in FAULTS])
def test_a_fault_is_named_with_its_remedy(env, level, what, cure):
    (found,) = (finding for finding in environment.judge(env) if 'CVE' not in finding.what)
    assert found.level == level
    assert what in found.what
    assert cure in found.cure


def test_working_environments_have_no_findings():
    (hole,) = environment.judge(CLASSIC)
    assert hole.level == 'warning'
    assert environment.judge(FORKS) == []
    twice = {**FORKS.installed, 'opencv-python-headless': FORKS.installed['opencv-python']}
    assert environment.judge(FORKS._replace(installed=twice)) == []
    assert environment.judge(without(FORKS, 'pkg_resources')) == []  # which nothing there imports
    assert environment.judge(NO_GPU._replace(torch_cuda=None))[1:] == []


@pytest.mark.parametrize(
    ('torch', 'holes'),
    [('2.1.2+cu121', 2), ('2.5.1', 2), ('2.6.0', 1), ('2.9.1+cpu', 1), ('2.10.0', 0), ('3.0.0a1', 0)],
)
def test_vulnerable_torch_versions_are_warned_about(torch, holes):
    env = version(FORKS._replace(torchvision_wants=''), 'torch', torch)
    found = environment.judge(env)
    assert [finding.level for finding in found] == ['warning'] * bool(holes)
    text = ''.join(finding.what for finding in found)
    assert ('CVE-2025-32434, closed in 2.6' in text) == (holes == 2)
    assert ('CVE-2026-24747, closed in 2.10' in text) == (holes >= 1)
    assert all('2.10 or newer' in finding.cure and '.safetensors' in finding.cure for finding in found)


def test_a_library_that_works_with_an_unsupported_mmcv_is_no_finding():
    assert [finding.level for finding in environment.judge(version(CLASSIC, 'mmcv', '2.2.0'))] == ['warning']


def test_remedies_fit_the_python_version():
    for python, name in [('3.11.2', 'classic.txt mmengine'), ('3.12.1', 'onedl.txt onedl-mmengine')]:
        nothing = environment.Environment(python, installed={}, present=[], modules={})
        cures = [finding.cure for finding in environment.judge(nothing)]
        assert f'pip install -c requirements/{name}' in cures


def test_findings_are_sorted_by_severity():
    found = environment.judge(without(NO_RESOURCES, *BASES))
    assert [finding.level for finding in found] == ['error', 'warning', 'note']


# --- The whole tool, on packages of a few lines -----------------------------------------------------

TORCH = """
__version__ = '2.11.0+cu130'
class version: cuda, hip = '13.0', None
class cuda: is_available = staticmethod(lambda: True)
class zeros:
    def __init__(self, size): pass
    def numpy(self): pass
def tensor(data, device): return data
"""
MMDET = """
import mmcv
mmcv_minimum_version = '2.0.0rc4'
mmcv_maximum_version = '2.2.0'
if mmcv.__version__ == '2.2.0':
    raise AssertionError('MMCV==2.2.0 is used but incompatible.')
"""
PACKAGES = {
    'numpy.py': "__version__ = '2.2.6'",
    'torch.py': TORCH,
    'torchvision/__init__.py': "__version__ = '0.26.0'",
    'torchvision/ops.py': 'def nms(boxes, scores, threshold): pass',
    'torchvision.dist-info/METADATA': 'Name: torchvision\nVersion: 0.26.0\nRequires-Dist: torch==2.11.0',
    'cv2.py': "print('noise of a module')",
    'mmengine/__init__.py': "__version__ = '0.10.7'",
    'mmengine/runner/__init__.py': '',
    'mmengine/runner/checkpoint.py': 'torch.load(file, weights_only=True)',
    'mmcv/__init__.py': "__version__ = '2.1.0'",
    'mmcv/ops.py': 'def nms(boxes, scores, threshold): pass',
    'mmdet/__init__.py': MMDET,
    'mmdet/models.py': '',
    'mmdet/datasets.py': '',
    'emo2_mm/__init__.py': '',
    'pkg_resources.py': '',
}


@pytest.fixture
def doctor(tmp_path):
    """Write packages, and let the tool judge an environment of these and nothing else."""

    def run(packages, *args, tools=()):
        (tmp_path / 'tools').mkdir()
        shutil.copy(TOOL, tmp_path / 'tools')
        for name, text in packages.items():
            path = tmp_path / 'packages' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        package = tmp_path / ('packages' if packages else '') / 'emo2_mm'
        (package / 'analysis').mkdir(parents=True)
        shutil.copy(environment.__file__, package / 'analysis')
        for name, text in dict(tools).items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        command = [sys.executable, '-S', tmp_path / 'tools' / 'check_env.py', *args]
        path = os.pathsep.join(str(tmp_path / name) for name in ('packages', 'later_on_the_path'))
        env = {**os.environ, 'PYTHONPATH': path, 'PATH': str(tmp_path)}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_working_packages_give_no_findings(doctor):
    done = doctor(PACKAGES, '--json')
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # the noise of a module is not in it
    assert report['findings'] == []
    assert report['limits'] == {'mmdet': [['mmcv', '2.0.0rc4', '2.2.0']]}
    assert report['torchvision_wants'] == '2.11.0'


def test_every_missing_package_is_named(doctor):
    done = doctor({})
    assert done.returncode == 1
    for name in ('torch', 'torchvision', 'numpy', 'mmengine', 'emo2_mm'):
        assert f'error: {name} is not installed. Cure: pip install' in done.stdout
    assert 'Traceback' not in done.stderr


def test_a_crash_is_a_finding_and_the_rest_is_still_tried(doctor):
    more = {'torchvision/__init__.py': 'import os; os.abort()', 'pkg_resources.py': 'raise SystemExit(3)'}
    done = doctor({**PACKAGES, **more})
    assert done.returncode == 1
    assert 'error: torchvision 0.26.0 does not fit torch 2.11.0: it crashes Python. Cure: pip' in done.stdout
    states = {
        line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[: len(environment.NEEDS) + 1]
    }
    assert states['mmcv.ops'] == states['emo2_mm'] == 'works'
    assert states['mmdet'] == 'tried'  # not tried
    assert states['mmseg'] == 'missing'
    assert states['pkg_resources'] == 'fails'


def test_faults_of_modules_are_found(doctor):
    more = {
        'torch.py': TORCH.replace('self): pass', 'self): raise RuntimeError').replace('True', 'False'),
        'torchvision.dist-info/METADATA': 'Name: torchvision\nRequires-Dist: torch (==2.10.0)',
        'mmengine/runner/checkpoint.py': 'torch.load(file)',
        'mmengine/utils.py': 'def f():\n    from pkg_resources import get_distribution\n',
        'mmcv/__init__.py': "__version__ = '2.2.0'",
        'mmcv/ops.py': "def nms(*args): raise RuntimeError('no kernel')",
        'mmcv/.mim/tools/draw.py': 'import pkg_resources',
        'pkg_resources.py': "raise ModuleNotFoundError('gone')",
        'mmcv-2.2.0.dist-info/METADATA': 'Name: mmcv\nVersion: 2.2.0',
        'onedl_mmcv-2.3.6.dist-info/METADATA': 'Name: onedl_mmcv\nVersion: 2.3.6',
        'mmdet.dist-info/METADATA': 'Name: mmdet\nVersion: 3.3.0',
        '../later_on_the_path/mmdet.dist-info/METADATA': 'Name: mmdet\nVersion: 3.0.0',
    }
    text = doctor(
        {**PACKAGES, **more}, tools={'nvidia-smi': '#!/bin/sh\necho "GPU 0: NVIDIA T4 (UUID: GPU-1)"'}
    ).stdout
    assert 'error: torch 2.11.0+cu130 was built for numpy 1 and cannot use numpy 2.2.6' in text
    assert 'warning: torchvision 0.26.0 does not fit torch 2.11.0, it is built for 2.10.0' in text
    assert 'error: mmengine 0.10.7 cannot resume its own checkpoints with torch 2.11.0' in text
    assert 'error: pkg_resources is missing, which mmengine imports' in text
    assert (
        'error: the operators of mmcv 2.2.0 do not work with this torch: RuntimeError: no kernel. Cure'
        in text
    )
    assert 'error: mmdet 3.3.0 takes mmcv >= 2.0.0rc4, < 2.2.0, not 2.2.0' in text
    assert (
        'error: classic packages and forks are mixed, which own the same modules: mmcv, onedl-mmcv, mmdet'
        in text
    )
    assert 'warning: torch 2.11.0+cu130 is built for CUDA 13.0 but cannot use this GPU: NVIDIA T4.' in text


# --- The environment at hand ------------------------------------------------------------------------


@pytest.mark.slow
def test_this_environment_has_no_errors():
    import mmcv
    import mmpretrain
    import torch

    done = subprocess.run([sys.executable, TOOL, '--json'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report['modules']) >= set(environment.NEEDS) - {'pkg_resources'}
    assert report['modules']['torch'] == torch.__version__
    assert report['modules']['mmcv'] == mmcv.__version__
    bounds = ['mmcv', mmpretrain.mmcv_minimum_version, mmpretrain.mmcv_maximum_version]
    assert bounds in report['limits']['mmpretrain']
    holes = [finding['level'] for finding in report['findings'] if 'CVE' in finding['what']]
    assert holes == ['warning'] * (environment.release(torch.__version__) < (2, 10))


@pytest.mark.slow
def test_an_mmcv_without_operators_is_an_error(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text("__version__ = '2.1.0'")
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, TOOL], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'error: mmcv 2.1.0 has no compiled operators' in done.stdout
    assert '--no-build-isolation' in done.stdout
