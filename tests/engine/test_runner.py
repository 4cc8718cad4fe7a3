"""Runners of several processes on CPUs, and SyncBN in one process."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers.networks import tiny
from helpers.tiny import BACKBONE, DETECTOR, call_tool, write_config, write_data
from mmengine.config import Config
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from emo2_mm.engine.runner import _use_cpu_processes, build_runner
from emo2_mm.errors import UserError


@pytest.mark.parametrize('machines', [1, 2])
def test_mpirun_on_several_machines_needs_the_address_of_the_first(monkeypatch, machines):
    environment = {'WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_SIZE': str(4 // machines)}
    monkeypatch.setattr(os, 'environ', environment)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    cfg = Config(dict(model={}, launcher='mpi'))
    if machines == 1:
        _use_cpu_processes(cfg)
        assert (environment['MASTER_ADDR'], environment['MASTER_PORT']) == ('127.0.0.1', '29500')
    else:
        with pytest.raises(UserError, match='mpirun -x MASTER_ADDR=HOST'):
            _use_cpu_processes(cfg)


def test_cpu_processes_keep_the_wrapper_of_the_config_and_replace_every_sync_bn(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    norms = [dict(type='SyncBN', eps=1e-3), dict(type='BN'), dict(type='GN', num_groups=2)]
    cfg = Config(
        dict(
            model=dict(module=dict(norm_cfg=norms[0], heads=[dict(norm_cfg=n) for n in norms])),
            find_unused_parameters=True,
            sync_bn='torch',
        )
    )
    _use_cpu_processes(cfg)
    assert 'SyncBN' not in json.dumps(cfg.to_dict())
    assert cfg.model.module.norm_cfg == dict(type='BN', eps=1e-3)
    assert cfg.model.module.heads[2].norm_cfg.type == 'GN'
    assert cfg.get('sync_bn') is None
    assert cfg.model_wrapper_cfg.find_unused_parameters
    assert cfg.model_wrapper_cfg.device_ids is None

    cfg = Config(dict(model={}, model_wrapper_cfg=dict(type='Mine', static_graph=True)))
    _use_cpu_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(type='Mine', static_graph=True, device_ids=None)


def test_sync_bn_in_one_process_trains_as_bn(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    synchronised = f"{BACKBONE[:-1]}, norm_cfg=dict(type='SyncBN'))"
    text, runners = DETECTOR.replace(BACKBONE, synchronised), []

    def keep(cfg):
        runners.append(build_runner(cfg))
        return runners[-1]

    monkeypatch.setattr('emo2_mm.engine.training.build_runner', keep)
    for kind in ('SyncBN', 'BN'):
        config = write_config(tmp_path, text.replace('SyncBN', kind), f'{kind}.py')
        options = ['--no-validate', '--cfg-options', f'experiment_name={tmp_path}-{kind}']
        call_tool('train.py', config, *options)

    models = [runner.model for runner in runners]
    for model in models:
        for part, number in ((model.backbone, 9), (model.neck, 6)):
            norms = [m for m in part.modules() if isinstance(m, _BatchNorm)]
            assert not any(isinstance(m, SyncBatchNorm) for m in norms)
            assert [m.num_batches_tracked.item() for m in norms] == [2] * number
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], msg=name)


def test_a_backbone_with_sync_bn_alone_computes_as_with_bn():
    found = []
    for kind in ('SyncBN', 'BN'):
        model = tiny(norm_cfg=dict(type=kind)).double().train()
        torch.manual_seed(0)
        maps = model(torch.randn(2, 3, 64, 48).double())
        sum((m * torch.randn_like(m)).sum() for m in maps).backward()
        assert isinstance(model.stem.norm, SyncBatchNorm) == (kind == 'SyncBN')
        found.append([*maps, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
