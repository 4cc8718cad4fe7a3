"""Training that is killed, finds no room, or is given a hostile file."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import BOMBS
from helpers.tiny import CLASSIFIER, ROOT, run, write_config, write_data

pytestmark = [pytest.mark.slow, pytest.mark.both_stacks]


pytest.importorskip('mmpretrain')
EPOCHS = 6
# no random numbers but those that shuffle the data: they follow from the seed and the epoch
SHUFFLED = CLASSIFIER.replace('shuffle=False', 'shuffle=True')
MORE = ['--cfg-options', f'train_cfg.max_epochs={EPOCHS}']


@pytest.fixture
def config(tmp_path: Path) -> str:
    write_data(tmp_path)
    return write_config(tmp_path, SHUFFLED)


def ended(result: subprocess.CompletedProcess, code: int = 0) -> str:
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def states(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds, as plain values."""
    content = torch.load(folder / f'epoch_{EPOCHS}.pth', weights_only=False)
    optimizer = content['optimizer']['state']
    return {
        **content['state_dict'],
        **{f'{i}.{name}': value for i, state in optimizer.items() for name, value in state.items()},
        'rates': torch.tensor([group['lr'] for group in content['optimizer']['param_groups']]),
    }


def metric(text: str) -> str:
    return re.findall(r'accuracy/top1: ([\d.]+)', text)[-1]


def test_a_killed_and_resumed_run_is_bitwise_the_same(tmp_path: Path, config: str) -> None:
    log = ended(run(tmp_path, 'train.py', config, '--work-dir', 'whole', *MORE))

    command = [sys.executable, str(ROOT / 'tools/train.py'), config, '--work-dir', 'parts', *MORE]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / 'parts/last_checkpoint').exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random(os.getpid()).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / f'parts/epoch_{EPOCHS}.pth').exists()

    resumed = ended(run(tmp_path, 'train.py', config, '--work-dir', 'parts', '--resume', *MORE))
    assert 'resumed epoch: ' in resumed
    whole, parts = states(tmp_path / 'whole'), states(tmp_path / 'parts')
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts[name])), name
    assert metric(log) == metric(resumed)


@pytest.fixture(scope='module')
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    write_data(folder)
    two = ['train_cfg.max_epochs=2', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    ended(run(folder, 'train.py', write_config(folder, SHUFFLED), '--cfg-options', *two))
    return folder / 'work_dirs/tiny'


@pytest.fixture
def trained(tmp_path: Path, trained_once: Path) -> Path:
    """A work dir with two checkpoints."""
    copy = shutil.copytree(trained_once, tmp_path / 'work_dirs/tiny')
    (copy / 'last_checkpoint').write_text('work_dirs/tiny/epoch_2.pth')
    return copy


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_truncated_checkpoint_is_skipped(tmp_path: Path, config: str, trained: Path) -> None:
    cut(trained / 'epoch_2.pth')
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    start = 'Not resumed from a damaged checkpoint: '
    assert f'{start}work_dirs/tiny/epoch_2.pth: the end of the file is missing' in log
    assert 'resumed epoch: 1, ' in log
    assert states(trained)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_is_one_message_and_the_run_resumes(tmp_path: Path, config: str, trained: Path) -> None:
    (trained / 'epoch_3.pth').symlink_to('/dev/full')
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE), 1)
    assert 'error: cannot write to ' in log and 'No space left on device' in log
    (trained / 'epoch_3.pth').unlink()
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    assert 'resumed epoch: 2, ' in log
    assert states(trained)


def test_an_unwritable_folder_is_one_message(tmp_path: Path, config: str) -> None:
    (tmp_path / 'file').touch()
    log = ended(run(tmp_path, 'train.py', config, '--work-dir', 'file/run'), 1)
    assert 'error: cannot write to ' in log and str(tmp_path / 'file') in log
    assert 'Traceback' not in log


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, config: str) -> None:
    file, marker = tmp_path / 'bomb.pth', tmp_path / 'marker'
    torch.save(
        dict(state_dict={}, meta=dict(epoch=1, iter=1), message_hub=BOMBS['posix.system'](marker)), file
    )
    log = ended(run(tmp_path, 'test.py', config, file), 1)
    assert f'error: {file}: ' in log and 'posix.system' in log and 'refused (nothing was executed)' in log
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the bomb is live
    assert marker.exists()


def test_the_config_in_a_checkpoint_does_not_run(tmp_path: Path, config: str, trained: Path) -> None:
    marker = tmp_path / 'marker'
    content = torch.load(trained / 'epoch_2.pth', weights_only=False)
    assert 'config' in content['meta'] or 'cfg' in content['meta']
    content['meta']['config'] = f'import os\nos.system("touch {marker}")\n'
    torch.save(content, trained / 'epoch_2.pth')
    assert 'resumed epoch: 2, ' in ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    assert not marker.exists()
