"""The steps of tools/make_env.sh, with an interpreter that only notes down what it is asked."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Sequence

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL = f'mmcv-2.1.0-cp39-cp39-linux_{platform.machine()}.whl'
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$NOTES"
case "$*" in
"- 11 10 9 8" | "- 12 11 10") echo "3.$MINOR"; case "$*" in *" $MINOR"*) ;; *) exit 3 ;; esac ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install "*torchvision*) [ -z "$BLOCK" ] || { touch "$BLOCK"; sleep 60; } ;;
"-m pip download "*) while [ "$1" != -d ]; do shift; done; echo good >"$2/$WHEEL" ;;
"-m pip wheel "*) while [ "$1" != -w ]; do shift; done; echo good >"$2/$WHEEL" ;;
"-m pip install "*.whl) while [ $# != 1 ]; do shift; done; cp "$1" "$NOTES.installed" ;;
"- cpu") grep -q good "$NOTES.installed" ;;
"-") echo 'all of it' ;;
esac
"""

FAKE_DF = """#!/bin/sh
printf 'Filesystem 1024-blocks Used Available\\nfake 0 0 %s\\n' "$FREE_KB"
"""


def listen() -> None:
    """Undo what nohup or a background job does: a shell cannot trap what it was told to ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Checkout:
    """A folder with what make_env.sh reads, a cache with an mmcv wheel, a fake Python and a fake disk."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / 'checkout'
        self.notes = folder / 'notes'
        self.python = folder / 'python'
        tools = folder / 'tools'
        tools.mkdir()
        for program, text in ((self.python, FAKE_PYTHON), (tools / 'df', FAKE_DF)):
            program.write_text(text)
            program.chmod(0o755)
        for name in ('tools/make_env.sh', 'requirements', 'setup.py', 'emo2_mm/version.py'):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
        self.wheel = folder / 'cache/emo2_mm/wheels/mmcv-2.1.0-torch2.1.2-cp39-cpu' / WHEEL
        self.wheel.parent.mkdir(parents=True)
        self.wheel.write_text('good')
        self.env = {
            **{k: v for k, v in os.environ.items() if k not in ('STACK', 'MAKEFLAGS')},
            'PYTHON': str(self.python),
            'GPU': '0',
            'XDG_CACHE_HOME': str(folder / 'cache'),
            'NOTES': str(self.notes),
            'WHEEL': WHEEL,
            'BLOCK': '',
            'MINOR': '9',
            'FREE_KB': str(9 * 2**20),
            'PATH': f'{tools}:{os.environ["PATH"]}',
        }

    def start(self, arguments: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
        self.notes.write_text('')
        return subprocess.Popen(
            [str(self.root / 'tools' / 'make_env.sh'), *arguments],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=listen,
        )

    def run(self, arguments: Sequence[str] = (), status: int = 0, **env: str) -> str:
        process = self.start(arguments, **env)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        return output

    def asked(self, words: str) -> bool:
        """Whether the last run asked the interpreter for it."""
        return words in self.notes.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_finished_steps_are_not_redone(checkout: Checkout) -> None:
    output = checkout.run()
    assert '[6/6]' in output and 'Environment .venv is ready (all of it)' in output
    assert checkout.asked('-m venv') and checkout.asked('torchvision') and checkout.asked(WHEEL)

    assert 'nothing to do' in checkout.run()
    assert not checkout.asked('-m pip')

    with (checkout.root / 'requirements' / 'dev.txt').open('a') as file:
        file.write('something-new\n')
    assert '3 of 6 steps to do' in checkout.run()
    assert checkout.asked('dev.txt') and checkout.asked('-e .')
    assert not checkout.asked('torchvision') and not checkout.asked(WHEEL)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_step_is_redone(checkout: Checkout, tmp_path: Path, number: int) -> None:
    blocked = tmp_path / 'blocked'
    process = checkout.start(BLOCK=str(blocked))
    while not blocked.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=10)[0]  # would hang if the step outlived the script
    assert process.returncode == 130 and 'Interrupted' in output

    assert '5 of 6 steps to do' in checkout.run()
    assert checkout.asked('torchvision') and not checkout.asked('-m venv')


def test_half_made_environment_is_remade(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / '.venv' / '.steps' / 'venv').unlink()
    (checkout.root / '.venv' / 'litter').touch()
    assert '6 of 6 steps to do' in checkout.run()
    assert not (checkout.root / '.venv' / 'litter').exists()


def test_environment_whose_python_is_gone_is_remade(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / '.venv' / 'bin' / 'python').unlink()
    assert '6 of 6 steps to do' in checkout.run()


def test_moved_checkout_gets_a_new_environment(checkout: Checkout) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.with_name('moved'))
    assert '6 of 6 steps to do' in checkout.run()


def test_environment_of_someone_else_is_left_alone(checkout: Checkout) -> None:
    theirs = checkout.root / '.venv' / 'bin' / 'python'
    theirs.parent.mkdir(parents=True)
    theirs.write_text('theirs')
    assert 'was not made by make env' in checkout.run(status=1)
    assert theirs.read_text() == 'theirs'


def test_wheel_that_does_not_work_is_replaced(checkout: Checkout) -> None:
    checkout.wheel.write_text('bad')
    output = checkout.run()
    assert 'the cached wheel does not work here: discarded' in output
    assert 'downloading a prebuilt wheel' in output
    assert checkout.wheel.read_text() == 'good\n'


def test_wrong_settings_are_named(checkout: Checkout) -> None:
    assert 'unknown STACK=bogus; known stacks: classic' in checkout.run(status=1, STACK='bogus')
    assert 'PYTHON=/bogus not found' in checkout.run(status=1, PYTHON='/bogus')
    assert 'PYTHON=/bin/false does not run' in checkout.run(status=1, PYTHON='/bin/false')
    assert not (checkout.root / '.venv').exists()


def test_full_disk_is_named_before_anything_is_fetched(checkout: Checkout) -> None:
    assert 'has 8 GB of free disk; 9 GB are needed' in checkout.run(status=1, FREE_KB=str(9 * 2**20 - 1))
    assert not (checkout.root / '.venv').exists()


def test_second_stack_has_its_own_environment(checkout: Checkout) -> None:
    wheel = f'onedl_mmcv-2.3.6-cp312-cp312-linux_{platform.machine()}.whl'
    onedl = {'STACK': 'onedl', 'MINOR': '12', 'WHEEL': wheel, 'CXX': 'true'}
    output = checkout.run(**onedl)
    assert '[6/6]' in output and 'Environment .venv-onedl is ready' in output
    assert checkout.asked('-m venv .venv-onedl') and checkout.asked('-r requirements/onedl.txt')
    assert not checkout.asked('classic.txt')
    assert checkout.asked('onedl-mmcv==2.3.6')
    kept = 'cache/emo2_mm/wheels/onedl-mmcv-2.3.6-torch2.11.0-cp312-cpu'
    assert (checkout.root.parent / kept / wheel).exists()
    assert not (checkout.root / '.venv').exists()
    assert 'Environment .venv-onedl is complete' in checkout.run(**onedl)


def test_stack_is_chosen_by_python(checkout: Checkout) -> None:
    for minor, stack in [('8', 'classic'), ('11', 'classic'), ('12', 'onedl'), ('13', 'onedl')]:
        assert checkout.run(MINOR=minor, arguments=['--stack']) == f'{stack}\n'
    assert '3.13; the onedl stack needs Python 3.10 - 3.12' in checkout.run(status=1, MINOR='13')
    assert not list(checkout.root.glob('.venv*'))


def test_environment_that_is_there_keeps_its_stack(checkout: Checkout, tmp_path: Path) -> None:
    """Where make env was told of a Python that is not found by itself, the next make is of the same stack."""
    only_new = tmp_path / 'bin'
    only_new.mkdir()
    (only_new / 'python3.12').symlink_to(checkout.python)
    found = {'PYTHON': '', 'PYENV_ROOT': '/none', 'PATH': f'{only_new}:/usr/bin:/bin', 'MINOR': '12'}
    for name in ('python3', 'python', *(f'python3.{minor}' for minor in range(8, 12))):
        (only_new / name).symlink_to('/bin/false')
    assert checkout.run(arguments=['--stack'], **found) == 'onedl\n'
    checkout.run()
    assert checkout.run(arguments=['--stack'], **found) == 'classic\n'


def test_makefile_knows_the_same_stacks() -> None:
    command = ['make', '-C', str(ROOT), 'help', 'STACK=../x']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and 'unknown STACK=../x; known stacks: classic onedl' in done.stderr


@pytest.mark.parametrize(('minor', 'folder'), [('11', '.venv'), ('12', '.venv-onedl')])
def test_makefile_takes_the_stack_of_python(checkout: Checkout, minor: str, folder: str) -> None:
    shutil.copy(ROOT / 'Makefile', checkout.root)
    env = {**checkout.env, 'MINOR': minor, 'PYTHON': '/none'}
    command = ['make', '-C', str(checkout.root), 'help', f'PYTHON={checkout.python}']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert f'set up {folder},' in done.stdout, done.stdout + done.stderr
