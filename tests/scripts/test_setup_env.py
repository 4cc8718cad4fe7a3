"""scripts/setup_env.sh, with a fake interpreter, uv, GPU and disk that record what they are asked to do."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL = f'mmcv-2.1.0-cp39-cp39-linux_{platform.machine()}.whl'
FAKES = {
    'python': """#!/bin/sh
echo "$*" >>"$NOTES"
case "$*" in
"-c import ensurepip"*) echo "3.$MINOR" ;;
"-c import torch; torch.zeros"*) [ -z "$BAD_DRIVER" ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$PWD/$3" >"$3/bin/activate" ;;
"-m pip install "*uv) cp "$FAKES/uv" .venv*/bin ;;
"-m pip config "*) exit 1 ;;
"-m pip download "*) [ -n "$PREBUILT" ] || exit 1; while [ "$1" != -d ]; do shift; done
    echo good >"$2/$WHEEL" ;;
"-m pip wheel "*) while [ "$1" != -w ]; do shift; done; echo good >"$2/$WHEEL" ;;
"- "*) grep -q good "$NOTES.installed" ;;
esac
""",
    'uv': """#!/bin/sh
echo "uv $*" >>"$NOTES"
case "$*" in
*torchvision*) [ -z "$BLOCK" ] || { touch "$BLOCK"; sleep 60; } ;;
*.whl) while [ $# != 1 ]; do shift; done; cp "$1" "$NOTES.installed" ;;
"pip list "*) echo torch==2.1.2 ;;
esac
""",
    'df': '#!/bin/sh\nprintf "Filesystem 1024-blocks Used Available\\nfake 0 0 %s\\n" "$FREE_KB"\n',
    'nvidia-smi': '#!/bin/sh\n[ -n "$GPUS" ] && printf "$GPUS\\n"\n',
}


def restore_signals() -> None:
    """Undo what nohup or a background job does: a shell cannot trap an ignored signal."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Checkout:
    """A checkout with what the script reads, and a cache with an mmcv wheel."""

    def __init__(self, folder: Path) -> None:
        self.root, self.notes, fakes = folder / 'checkout', folder / 'notes', folder / 'fakes'
        fakes.mkdir()
        for name, text in FAKES.items():
            (fakes / name).write_text(text)
            (fakes / name).chmod(0o755)
        self.python = fakes / 'python'
        files = 'scripts', 'requirements', 'setup.py', 'pyproject.toml', 'Makefile', 'emo2_mm/version.py'
        for name in files:
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
        self.cache = folder / 'cache/emo2_mm/wheels'
        self.wheel = self.cache / 'mmcv-2.1.0-torch2.1.2-cp39-cpu' / WHEEL
        self.wheel.parent.mkdir(parents=True)
        self.wheel.write_text('good')
        self.env = {
            **{k: v for k, v in os.environ.items() if k not in ('STACK', 'MAKEFLAGS', 'GPU')},
            **dict.fromkeys(['BLOCK', 'GPUS', 'BAD_DRIVER', 'PREBUILT'], ''),
            **dict(PYTHON=str(self.python), MINOR='9', WHEEL=WHEEL, FREE_KB=str(9 * 2**20)),
            **dict(NOTES=str(self.notes), FAKES=str(fakes), XDG_CACHE_HOME=str(folder / 'cache')),
            'PATH': f'{fakes}:{os.environ["PATH"]}',
        }

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        self.notes.write_text('')
        return subprocess.Popen(
            [str(self.root / 'scripts/setup_env.sh'), *arguments],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=restore_signals,
        )

    def run(self, *arguments: str, status: int = 0, **env: str) -> str:
        process = self.start(*arguments, **env)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        return output

    def asked(self, words: str) -> bool:
        """Whether the last run asked a fake for it."""
        return words in self.notes.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_complete_environment_is_left_alone(checkout: Checkout) -> None:
    assert 'Environment .venv is ready (torch==2.1.2)' in checkout.run()
    assert checkout.asked('-m venv') and checkout.asked('torchvision') and checkout.asked(WHEEL)
    assert 'nothing to do' in checkout.run()
    assert not checkout.asked('install')


def test_changed_requirements_are_installed_alone(checkout: Checkout) -> None:
    checkout.run()
    with (checkout.root / 'requirements/dev.txt').open('a') as file:
        file.write('something-new\n')
    checkout.run()
    assert checkout.asked('dev.txt') and checkout.asked('-e .')
    assert not checkout.asked('-m venv') and not checkout.asked(WHEEL)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_set_up_continues(checkout: Checkout, tmp_path: Path, number: int) -> None:
    blocked = tmp_path / 'blocked'
    process = checkout.start(BLOCK=str(blocked))
    while not blocked.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=10)[0]  # would hang if the command outlived the script
    assert process.returncode == 130 and 'Interrupted' in output
    checkout.run()
    assert checkout.asked('torchvision') and not checkout.asked('-m venv')


@pytest.mark.parametrize('damage', ['half made', 'no interpreter', 'moved', 'other Python'])
def test_unusable_environment_is_created_again(checkout: Checkout, damage: str) -> None:
    checkout.run()
    if damage == 'half made':
        (checkout.root / '.venv/.steps/python').unlink()
    elif damage == 'no interpreter':
        (checkout.root / '.venv/bin/python').unlink()
    elif damage == 'moved':
        checkout.root = checkout.root.rename(checkout.root.with_name('moved'))
    else:
        checkout.env['MINOR'] = '10'
        checkout.wheel.parent.rename(checkout.cache / 'mmcv-2.1.0-torch2.1.2-cp310-cpu')
    (checkout.root / '.venv/old').touch()
    checkout.run()
    assert checkout.asked('-m venv') and not (checkout.root / '.venv/old').exists()


def test_foreign_environment_is_left_alone(checkout: Checkout) -> None:
    theirs = checkout.root / '.venv/bin/python'
    theirs.parent.mkdir(parents=True)
    theirs.write_text('theirs')
    assert 'was not created by make env' in checkout.run(status=1)
    assert theirs.read_text() == 'theirs'


def test_wheel_comes_from_cache_then_index_then_compiler(checkout: Checkout) -> None:
    checkout.wheel.write_text('bad')
    output = checkout.run(PREBUILT='1')
    assert 'this cached wheel does not work here: discarded' in output
    assert checkout.asked('download.openmmlab.com/mmcv/dist/cpu/torch2.1.0')
    assert not checkout.asked('pip wheel')
    assert checkout.wheel.read_text() == 'good\n'

    checkout.wheel.unlink()
    shutil.rmtree(checkout.root / '.venv')
    assert 'compiling mmcv 2.1.0 for cpu' in checkout.run(CXX='true')
    assert checkout.notes.read_text().count('pip download') == 1
    assert checkout.wheel.read_text() == 'good\n'


def test_missing_compiler_is_reported_before_large_downloads(checkout: Checkout) -> None:
    checkout.wheel.unlink()
    assert 'these are missing: g++' in checkout.run(status=1, CXX='no-such-compiler')
    assert not checkout.asked('torchvision')


def test_wrong_settings_are_reported(checkout: Checkout) -> None:
    assert 'unknown STACK=bogus; known stacks: classic, onedl' in checkout.run(status=1, STACK='bogus')
    for python in ('/bogus', '/bin/false'):
        output = checkout.run(status=1, PYTHON=python, STACK='classic')
        assert f'PYTHON={python}: the classic stack needs Python 3.8 - 3.11 with venv' in output
    assert 'the onedl stack needs Python 3.10 - 3.12' in checkout.run(status=1, MINOR='13')
    assert 'has 8 GB of free disk; 9 GB are needed' in checkout.run(status=1, FREE_KB=str(9 * 2**20 - 1))
    assert not list(checkout.root.glob('.venv*'))


def test_second_stack_has_its_own_environment(checkout: Checkout) -> None:
    wheel = f'onedl_mmcv-2.3.7-cp312-cp312-linux_{platform.machine()}.whl'
    onedl = dict(STACK='onedl', MINOR='12', WHEEL=wheel, PREBUILT='1')
    assert 'Environment .venv-onedl is ready' in checkout.run(**onedl)
    assert checkout.asked('-m venv .venv-onedl') and checkout.asked('-r requirements/onedl.txt')
    assert checkout.asked('https://mmwheels.onedl.ai/cpu-torch2120/simple/onedl-mmcv/')
    assert checkout.asked('onedl-mmcv>=2.3.6,<=2.3.7') and not checkout.asked('classic.txt')
    assert (checkout.cache / 'onedl-mmcv-2.3.6-torch2.12.0-cp312-cpu' / wheel).exists()
    assert not (checkout.root / '.venv').exists()
    assert 'Environment .venv-onedl is complete' in checkout.run(**onedl)


@pytest.mark.parametrize(
    ('minor', 'gpus', 'stack'),
    [
        ('8', '', 'classic'),
        ('11', '', 'classic'),
        ('12', '', 'onedl'),
        ('13', '', 'onedl'),
        ('11', '9.0', 'classic'),
        ('11', '7.0', 'classic'),
        ('11', '10.0', 'onedl'),
        ('11', r'8.9\n12.0', 'onedl'),
        ('12', '8.9', 'onedl'),
        ('11', r'No devices were found', 'classic'),
    ],
)
def test_stack_is_chosen_by_gpu_and_python(checkout: Checkout, minor: str, gpus: str, stack: str) -> None:
    assert checkout.run('--stack', MINOR=minor, GPUS=gpus) == f'{stack}\n'
    assert checkout.run('--stack', MINOR='11', GPUS=gpus, GPU='0') == 'classic\n'


def test_existing_environment_keeps_its_stack(checkout: Checkout, tmp_path: Path) -> None:
    """A PYTHON that was given once need not be given again; a new GPU asks for another stack."""
    checkout.run()
    other = tmp_path / 'bin'
    other.mkdir()
    (other / 'python3.12').symlink_to(checkout.python)
    for name in ('python3', 'python', *(f'python3.{minor}' for minor in range(8, 12))):
        (other / name).symlink_to('/bin/false')
    (other / 'nvidia-smi').symlink_to(tmp_path / 'fakes/nvidia-smi')
    found = dict(PYTHON='', PYENV_ROOT='/none', PATH=f'{other}:/usr/bin:/bin', MINOR='12')
    assert checkout.run('--stack', **found) == 'classic\n'
    assert checkout.run('--stack', **found, GPUS='12.0') == 'onedl\n'
    shutil.rmtree(checkout.root / '.venv')
    assert checkout.run('--stack', **found) == 'onedl\n'


def test_gpu_decides_the_wheel(checkout: Checkout) -> None:
    checkout.wheel.parent.rename(checkout.cache / 'mmcv-2.1.0-torch2.1.2-cp39-cu121')
    assert 'classic stack, cu121' in checkout.run(GPUS='9.0')
    assert checkout.asked('- cu121')


def test_unusable_gpu_is_reported(checkout: Checkout) -> None:
    output = checkout.run(GPUS='12.0', STACK='classic')
    assert 'The classic stack supports GPUs of compute capability 5.0 to 9.0, not 12.0' in output
    assert 'onedl: 7.5 to 12.1' in output and checkout.asked('- cpu')
    shutil.rmtree(checkout.root / '.venv')
    (checkout.cache / 'mmcv-2.1.0-torch2.1.2-cp39-cu121').mkdir()
    shutil.copy(checkout.wheel, checkout.cache / 'mmcv-2.1.0-torch2.1.2-cp39-cu121')
    assert 'torch cannot use the GPU (is its driver older' in checkout.run(GPUS='9.0', BAD_DRIVER='1')
    assert checkout.asked('- cpu')


def test_makefile_uses_the_chosen_stack(checkout: Checkout) -> None:
    command = ['make', '-C', str(checkout.root), '--no-print-directory', '-n', 'lint']
    for minor, folder in (('11', '.venv'), ('12', '.venv-onedl')):
        env = {**checkout.env, 'MINOR': minor}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert f'{folder}/bin' in done.stdout, done.stdout + done.stderr


def test_makefile_help_and_clean_do_not_look_for_a_stack(checkout: Checkout) -> None:
    for goal in ('help', 'clean'):
        checkout.notes.write_text('')
        subprocess.run(['make', '-C', str(checkout.root), goal], env=checkout.env, check=True)
        assert not checkout.notes.read_text()
