"""Configs as the tools read them, and the ranks that launchers set."""

from __future__ import annotations

import os

import pytest
from helpers.tiny import CLASSIFIER, DETECTOR, call_tool, write_config
from mmengine.config import Config

from emo2_mm.config import set_ranks
from emo2_mm.errors import UserError, local_rank


def test_arguments_of_tools_reach_the_config(tmp_path, monkeypatch):
    config = write_config(tmp_path, CLASSIFIER)
    calls = []
    monkeypatch.setattr('emo2_mm.engine.train', lambda cfg, *_: calls.append((cfg, local_rank())))

    def load(*arguments):
        call_tool('train.py', config, *arguments)
        return calls[-1][0]

    cfg = load()
    assert cfg.work_dir == 'work_dirs/tiny'
    assert cfg.launcher == 'none'
    for stage in ('train', 'val', 'test'):
        loader = cfg[f'{stage}_dataloader']
        assert loader.collate_fn == dict(type='default_collate')
        assert loader.persistent_workers is False  # a loader without workers refuses True
    cfg = load('--cfg-options', 'work_dir=a', 'train_dataloader.num_workers=2')
    assert cfg.work_dir == 'a'
    assert cfg.train_dataloader.persistent_workers is True
    assert load('--cfg-options', 'work_dir=a', '--work-dir', 'b').work_dir == 'b'
    for spelling in ('--local_rank', '--local-rank'):
        load(f'{spelling}=1')
        assert calls[-1][1] == 1
    assert 'collate_fn' not in Config.fromfile(write_config(tmp_path, DETECTOR)).train_dataloader


@pytest.mark.parametrize(
    ('launcher', 'names'),
    [
        ('pytorch', ['RANK', 'WORLD_SIZE', 'LOCAL_RANK']),
        ('slurm', ['SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID']),
        ('mpi', [f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK')]),
    ],
)
def test_ranks_of_the_launcher_are_set_and_their_absence_is_an_error(monkeypatch, launcher, names):
    environment = {'LOCAL_RANK': '7', **dict(zip(names, '582'))}
    monkeypatch.setattr(os, 'environ', environment)
    set_ranks(launcher)
    assert [environment[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['5', '8', '2']
    assert local_rank() == 2

    monkeypatch.setattr(os, 'environ', {})
    with pytest.raises(UserError, match=f'--launcher {launcher} goes with {names[0]}, which is not set'):
        set_ranks(launcher)
