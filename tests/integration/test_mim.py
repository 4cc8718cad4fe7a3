"""What mim makes of an installed wheel, in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import ROOT
from mmengine.fileio import load

OPENMIM = 'openmim==0.3.9'


class Environment:
    """A virtual environment with the packages of the running one, this project's left out.

    It has a pip and a folder to work in of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.work = folder / 'env', folder / 'work'
        self.work.mkdir()
        subprocess.run([sys.executable, '-m', 'venv', str(self.root)], check=True)
        running = Path(sysconfig.get_path('purelib'))
        self.packages = self.root / running.relative_to(sys.prefix)
        shared = folder / 'shared'
        shared.mkdir()
        for path in running.iterdir():
            if 'emo2_mm' not in path.name:
                (shared / path.name).symlink_to(path)
        (self.packages / 'shared.pth').write_text(f'{shared}\n')
        self.env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
        self.env.update(
            PATH=os.pathsep.join([str(self.root / 'bin'), os.environ['PATH']]),
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
        )

    def run(self, *command: object, fails: bool = False) -> str:
        """Run a program of the environment and return what it says, without colours."""
        done = subprocess.run(
            [str(self.root / 'bin' / str(command[0])), *map(str, command[1:])],
            cwd=self.work,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = re.sub(r'\x1b\[[0-9;]*m', '', done.stdout)
        if not fails:
            assert done.returncode == 0, f'{command}: {said[-4000:]}'
        return said

    def mim(self, command: str, *more: object) -> str:
        return self.run('mim', *command.split(), *more)


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    """An environment with mim and a wheel of this project, which mim installed."""
    new = Environment(tmp_path)
    numpy = f'numpy=={np.__version__}'  # the one that is shared
    wanted = ['pip', 'install', '--disable-pip-version-check', 'setuptools<82', numpy, OPENMIM]
    said = new.run(*wanted, fails=True)
    if 'from versions: none' in said:
        pytest.skip(f'needs a package index, to install {OPENMIM} from: pip found none')
    assert 'Successfully installed' in said, said[-4000:]
    new.env['HOME'] = str(tmp_path)  # mim keeps a cache there

    source, wheels = tmp_path / 'source', tmp_path / 'wheels'
    source.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'model-index.yml'):
        shutil.copy(ROOT / name, source)
    for name in ('emo2_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name)
    build = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, source]
    done = subprocess.run(list(map(str, build)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.iterdir()
    assert 'Successfully installed emo2' in new.mim('install', wheel)
    return new


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason='openmim requires a setuptools that does not run on Python 3.12; its fork, onedl-mim 0.5.1, takes '
    'the dist-info folder for the package, unless their names differ',
)
@pytest.mark.timeout(900)  # a minute on an idle machine
def test_session(env: Environment) -> None:
    installed = env.packages / 'emo2_mm'
    assert env.run('python', '-c', 'import emo2_mm; print(emo2_mm.__path__)').strip() == f"['{installed}']"
    assert re.search(r'^emo2[-_]mm +\d', env.mim('list'), re.MULTILINE)

    # search: every model of the metafiles, and what is said of one
    metafiles = [load(ROOT / path) for path in load(ROOT / 'model-index.yml')['Import']]
    models = {model['Name']: model for file in metafiles for model in file['Models']}
    env.mim('search emo2_mm --model emov2 --json found.json')
    found = json.loads((env.work / 'found.json').read_text())
    assert found['config'] == {name: model['Config'] for name, model in models.items()}
    assert found['parameters']['emo2_5m'] == models['emo2_5m']['Metadata']['Parameters']
    assert 'config id: emo2_5m\n' in env.mim('search emo2_mm --config emo2_5m --field parameters flops')

    # a script of a folder of tools/, then training and testing of a config by its name
    env.mim('run emo2_mm make_digits data/digits --scenes 1 --val-scenes 1 --copies 1')
    few = ['train_dataloader.batch_size=16', 'train_dataloader.dataset.indices=32']
    few += ['val_dataloader.dataset.indices=64', 'test_dataloader.dataset.indices=64']
    few += ['train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']
    said = env.mim('train emo2_mm emo2_1m_digits.py --gpus 0 --cfg-options', *few)
    assert f'{installed}/.mim/tools/train.py' in said
    assert 'Epoch(train) [1][2/2]' in said
    assert 'Epoch(val) [1][1/1]    accuracy/top1: ' in said
    checkpoint = env.work / 'work_dirs/emo2_1m_digits/epoch_1.pth'
    said = env.mim('test emo2_mm emo2_1m_digits.py --gpus 0 --checkpoint', checkpoint, '--cfg-options', *few)
    assert 'Epoch(test) [1/1]    accuracy/top1: ' in said

    # download: mim fetches weights that are not there yet, and writes the config as one file
    weights = Path(models['emo2_5m']['Weights'])
    (env.work / 'got').mkdir()
    (env.work / 'got' / weights.name).touch()
    said = env.mim('download emo2_mm --config emo2_5m --dest got')
    assert f'{weights.name} exists in {env.work}/got' in said
    said = env.mim('run emo2_mm get_flops got/emo2_5m.py --json')
    (counted,) = (json.loads(line) for line in said.splitlines() if line.startswith('{'))
    assert counted['params'] == found['parameters']['emo2_5m']
    assert counted['flops'] == found['flops']['emo2_5m']
