"""The checkpoint that a run resumes from, and what is read of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from emo2_mm.engine.resume import find_resumable, install_safe_loader, load_checkpoint_safely
from emo2_mm.errors import UserError

pytestmark = pytest.mark.both_stacks


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A work dir with two checkpoints."""
    for epoch in (1, 2):
        torch.save(dict(meta=dict(epoch=epoch), optimizer={}), tmp_path / f'epoch_{epoch}.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    return tmp_path


def resumed_from(work_dir: Path) -> str | None:
    """The checkpoint that a run with ``--resume`` would load."""
    cfg = Config(dict(work_dir=str(work_dir), resume=True))
    find_resumable(cfg)
    return cfg.get('load_from') if cfg.resume else None


def test_the_last_checkpoint_counts_not_the_one_with_the_highest_number(trained: Path) -> None:
    (trained / 'last_checkpoint').write_text(str(trained / 'epoch_1.pth'))
    assert resumed_from(trained) == str(trained / 'epoch_1.pth')


@pytest.mark.parametrize('pointer', ['', 'gone.pth', None])
def test_without_a_valid_pointer_the_highest_number_counts(trained: Path, pointer: str | None) -> None:
    (trained / 'last_checkpoint').unlink()
    if pointer is not None:
        (trained / 'last_checkpoint').write_text(pointer)
    assert resumed_from(trained) == str(trained / 'epoch_2.pth')


def test_truncated_checkpoints_are_skipped_and_reported(trained: Path, capsys: pytest.CaptureFixture) -> None:
    for epoch in (2, 1):
        file = trained / f'epoch_{epoch}.pth'
        file.write_bytes(file.read_bytes()[:-100])
        if epoch == 2:
            assert resumed_from(trained) == str(trained / 'epoch_1.pth')
            said = capsys.readouterr().out
            assert f'Not resumed from a damaged checkpoint: {file}: the end of the file is missing' in said
    with pytest.raises(UserError, match='none of the 2 checkpoints in .* is intact'):
        resumed_from(trained)


def test_weights_without_optimizer_state_cannot_be_resumed(tmp_path: Path) -> None:
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from=str(tmp_path / 'weights.pth')))
    with pytest.raises(UserError, match='contains weights but no optimizer state; to start from'):
        find_resumable(cfg)


def test_an_empty_work_dir_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert resumed_from(tmp_path / 'new') is None
    assert 'training starts from the beginning' in capsys.readouterr().out


@pytest.mark.parametrize(
    'address', ['{}', 'file.pth', 'http://host/{}', 'https://host/{}', 's3://a/b.pth', 'c:petrel://a/b.pth']
)
def test_every_checkpoint_is_read_as_data(address: str) -> None:
    """``load_from``, ``resume`` and ``Pretrained`` all ask MMEngine's loader."""
    install_safe_loader()
    assert CheckpointLoader._get_checkpoint_loader(address) is load_checkpoint_safely


def test_config_text_and_running_means_are_dropped(tmp_path: Path) -> None:
    log, info = dict(loss=HistoryBuffer([1.0], [1])), dict(best_score=np.float64(0.25))
    hub = dict(log_scalars=log, runtime_info=info)
    torch.save(dict(meta=dict(epoch=3, config='code'), message_hub=hub), tmp_path / 'a.pth')
    assert load_checkpoint_safely(str(tmp_path / 'a.pth')) == dict(
        meta=dict(epoch=3), message_hub=dict(log_scalars={}, runtime_info=dict(best_score=0.25))
    )
