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

import numpy as np
import pytest
import torch
from helpers.tiny import CLASSIFIER, ROOT, run, write_config, write_data
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from emo2_mm.engine.resume import find_resumable, install_safe_loader, load_checkpoint_safely
from emo2_mm.errors import UserError

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


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(tmp_path: Path, config: str) -> None:
    """To the bit, wherever it is killed."""
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


def test_a_checkpoint_cut_off_is_passed_over(tmp_path: Path, config: str, trained: Path) -> None:
    cut(trained / 'epoch_2.pth')
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    start = 'Not resumed from a damaged checkpoint: '
    assert f'{start}work_dirs/tiny/epoch_2.pth: the end of the file is missing' in log
    assert 'resumed epoch: 1, ' in log
    assert states(trained)


def test_a_checkpoint_of_an_earlier_run_is_not_taken(trained: Path) -> None:
    (trained / 'last_checkpoint').write_text(str(trained / 'epoch_1.pth'))
    cfg = Config(dict(work_dir=str(trained), resume=True))
    find_resumable(cfg)
    assert cfg.load_from == str(trained / 'epoch_1.pth')


@pytest.mark.parametrize('pointer', ['', 'gone.pth', None])
def test_without_word_of_the_last_checkpoint(trained: Path, pointer: str | None) -> None:
    (trained / 'last_checkpoint').unlink()
    if pointer is not None:
        (trained / 'last_checkpoint').write_text(pointer)
    cfg = Config(dict(work_dir=str(trained), resume=True))
    find_resumable(cfg)
    assert cfg.load_from == str(trained / 'epoch_2.pth')


def test_weights_alone_are_nothing_to_resume_from(tmp_path: Path) -> None:
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from=str(tmp_path / 'weights.pth')))
    with pytest.raises(UserError, match='contains weights but no optimizer state; to start from'):
        find_resumable(cfg)


def test_nothing_to_resume_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = Config(dict(work_dir=str(tmp_path / 'new'), resume=True))
    find_resumable(cfg)
    assert not cfg.resume and cfg.get('load_from') is None
    assert 'training starts from the beginning' in capsys.readouterr().out


def test_nothing_but_damaged_checkpoints(tmp_path: Path, config: str, trained: Path) -> None:
    for file in trained.glob('*.pth'):
        cut(file)
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE), 1)
    assert 'error: --resume: none of the 2 checkpoints in' in log
    assert 'Epoch(train)' not in log


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk(tmp_path: Path, config: str, trained: Path) -> None:
    (trained / 'epoch_3.pth').symlink_to('/dev/full')
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE), 1)
    assert 'error: cannot write to ' in log and 'No space left on device' in log
    (trained / 'epoch_3.pth').unlink()
    log = ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    assert 'resumed epoch: 2, ' in log
    assert states(trained)


def test_unwritable_folder(tmp_path: Path, config: str) -> None:
    (tmp_path / 'file').touch()
    log = ended(run(tmp_path, 'train.py', config, '--work-dir', 'file/run'), 1)
    assert 'error: cannot write to ' in log and str(tmp_path / 'file') in log
    assert 'Traceback' not in log


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f'touch {self.marker}',)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, config: str) -> None:
    file, marker = tmp_path / 'bomb.pth', tmp_path / 'marker'
    torch.save(dict(state_dict={}, meta=dict(epoch=1, iter=1), message_hub=Bomb(marker)), file)
    log = ended(run(tmp_path, 'test.py', config, file), 1)
    assert f'error: {file}: ' in log and 'posix.system' in log and 'refused (nothing was executed)' in log
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the bomb is live
    assert marker.exists()


@pytest.mark.parametrize(
    'address', ['{}', 'file.pth', 'http://host/{}', 'https://host/{}', 's3://a/b.pth', 'c:petrel://a/b.pth']
)
def test_every_checkpoint_is_read_as_data(address: str) -> None:
    """``load_from``, ``resume`` and ``Pretrained`` all ask MMEngine's loader."""
    install_safe_loader()
    assert CheckpointLoader._get_checkpoint_loader(address) is load_checkpoint_safely


def test_the_config_in_a_checkpoint_does_not_run(tmp_path: Path, config: str, trained: Path) -> None:
    marker = tmp_path / 'marker'
    content = torch.load(trained / 'epoch_2.pth', weights_only=False)
    assert 'config' in content['meta'] or 'cfg' in content['meta']
    content['meta']['config'] = f'import os\nos.system("touch {marker}")\n'
    torch.save(content, trained / 'epoch_2.pth')
    assert 'resumed epoch: 2, ' in ended(run(tmp_path, 'train.py', config, '--resume', *MORE))
    assert not marker.exists()


def test_what_is_left_of_a_checkpoint_to_resume(tmp_path: Path) -> None:
    log, info = dict(loss=HistoryBuffer([1.0], [1])), dict(best_score=np.float64(0.25))
    hub = dict(log_scalars=log, runtime_info=info)
    torch.save(dict(meta=dict(epoch=3, config='code'), message_hub=hub), tmp_path / 'a.pth')
    assert load_checkpoint_safely(str(tmp_path / 'a.pth')) == dict(
        meta=dict(epoch=3), message_hub=dict(log_scalars={}, runtime_info=dict(best_score=0.25))
    )
