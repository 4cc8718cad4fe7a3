"""Training and testing in several processes, started by the shell scripts."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.networks import tiny
from helpers.processes import arguments_given, free_port
from helpers.tiny import BACKBONE, DETECTOR, ROOT, call_tool, run, write_config, write_data
from mmengine.config import Config
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from emo2_mm.config import set_ranks
from emo2_mm.engine.runner import _use_cpu_processes, build_runner
from emo2_mm.errors import UserError, local_rank

# Kept by each process: the images it saw, and its weights at the end.
HOOK = """
import os
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Witness(Hook):
    def before_train(self, runner):
        self.images = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.images += [sample.img_id for sample in data_batch['data_samples']]

    def after_train(self, runner):
        weights = dict(runner.model.module.named_parameters())
        torch.save((self.images, weights), f"process_{os.environ['RANK']}.pt")
"""
WITNESS = """
custom_imports = dict(imports=['witness'])
custom_hooks = [dict(type='Witness')]
"""


def write_witnessed(folder):
    """Write the data, the detector with the hook, and what every launch needs in its environment."""
    write_data(folder)
    (folder / 'witness.py').write_text(HOOK)
    return write_config(folder, DETECTOR + WITNESS), dict(PYTHONPATH=str(folder))


def check_training(folder, work_dir):
    """Two epochs: each process saw half of the images, both ended with the weights that were saved."""
    images, weights = zip(*(torch.load(folder / f'process_{i}.pt') for i in range(2)))
    assert [sorted(seen) for seen in images] == [[0, 0, 2, 2], [1, 1, 3, 3]]
    saved = torch.load(folder / work_dir / 'epoch_2.pth', weights_only=False)['state_dict']
    before = torch.load(folder / work_dir / 'epoch_1.pth', weights_only=False)['state_dict']
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
        assert torch.equal(weight, saved[name])
    assert any(not torch.equal(weight, before[name]) for name, weight in weights[0].items())
    assert len(list((folder / work_dir).glob('*/*.log'))) == 1  # one process writes


def check_testing(folder, result):
    """All images were seen, each once."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count('coco/bbox_mAP: ') == 1
    found = pickle.loads((folder / 'all.pkl').read_bytes())
    assert sorted(image['img_id'] for image in found) == [0, 1, 2, 3]


def test_two_processes(tmp_path):
    """Each process sees half of the images, and both end with the same weights."""
    pytest.importorskip('mmdet')
    config, env = write_witnessed(tmp_path)
    options = ['--work-dir', 'two words', '--cfg-options', 'train_cfg.max_epochs=2']
    result = run(tmp_path, 'dist_train.sh', config, 2, *options, PORT=free_port(), **env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count('SyncBN of the config became BN') == 1
    assert 'Epoch(train) [2][1/1]' in result.stdout
    assert 'coco/bbox_mAP: ' in result.stdout
    check_training(tmp_path, 'two words')

    arguments = [config, tmp_path / 'two words/epoch_2.pth', 2, '--out', 'all.pkl']
    check_testing(tmp_path, run(tmp_path, 'dist_test.sh', *arguments, PORT=free_port(), **env))


@pytest.mark.slow
def test_two_launches(tmp_path):
    """A launch on each of two machines, which share a disk: here, two on one."""
    pytest.importorskip('mmdet')
    config, env = write_witnessed(tmp_path)
    env.update(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=free_port())
    options = ['--work-dir', 'shared', '--cfg-options', 'train_cfg.max_epochs=2']

    def launch(number):
        return run(tmp_path, 'dist_train.sh', config, 1, *options, NODE_RANK=str(number), **env)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(launch, range(2)))
    for result in results:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        assert result.stdout.count('SyncBN of the config became BN') == 1  # once a machine
    assert [('Epoch(train) [2][1/1]' in result.stdout) for result in results] == [True, False]
    check_training(tmp_path, 'shared')


# What Slurm does on one node: start each task with its numbers, and list the names of the nodes.
SRUN = """#!/bin/sh
while :; do
    case $1 in
    --ntasks=*) export SLURM_NTASKS="${1#*=}" ;;
    -*) ;;
    *) break ;;
    esac
    shift
done
export SLURM_NODELIST='node[1-2]'
task=0 tasks=
while [ $task -lt $SLURM_NTASKS ]; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks="$tasks $!"
    task=$((task + 1))
done
for task in $tasks; do wait $task || exit 1; done
"""
SCONTROL = """#!/bin/sh
[ "$*" = 'show hostnames node[1-2]' ] && printf '127.0.0.1\\nnowhere\\n'
"""


@pytest.mark.slow
def test_slurm(tmp_path):
    """Without a GPU, tasks of Slurm become processes on the CPU."""
    pytest.importorskip('mmdet')
    config, env = write_witnessed(tmp_path)
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env.update(GPUS='2', PATH=f'{tmp_path}:/usr/bin:/bin', LOCAL_RANK='1')  # of another launcher
    options = ['--cfg-options', 'train_cfg.max_epochs=2']
    command = ['slurm_train.sh', 'cpu', 'name', config, 'two words', *options]
    result = run(tmp_path, *command, MASTER_PORT=free_port(), **env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count('SyncBN of the config became BN') == 1
    check_training(tmp_path, 'two words')

    command = ['slurm_test.sh', 'cpu', 'name', config, 'two words/epoch_2.pth', '--out', 'all.pkl']
    check_testing(tmp_path, run(tmp_path, *command, MASTER_PORT=free_port(), **env))


def test_failure_is_reported(tmp_path):
    """Both processes miss the data: one tells so, and the launcher fails."""
    config = write_config(tmp_path, DETECTOR)
    result = run(tmp_path, 'dist_train.sh', config, 2, PORT=free_port())
    assert result.returncode != 0
    assert result.stderr.count('reads data that is not there') == 1


@pytest.mark.parametrize(
    'command',
    [
        ['dist_train.sh'],
        ['dist_train.sh', 'a.py'],
        ['dist_train.sh', 'a.py', '--resume'],
        ['dist_test.sh', 'a.py', 'a.pth'],
        ['dist_test.sh', 'a.py', '2', 'a.pth'],
        ['slurm_train.sh', 'gpu', 'name', 'a.py'],
        ['slurm_test.sh', 'gpu', 'name', 'a.py'],
    ],
    ids=' '.join,
)
def test_usage(tmp_path, command):
    result = run(tmp_path, *command)
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ')
    assert command[0] in result.stderr


def test_dist_arguments(tmp_path):
    command = ['dist_test.sh', 'my config.py', 'my file.pth', 4, '--cfg-options', 'a="b c"']
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='host', PORT='29501')
    env['PYTHON'] = str(tmp_path / 'python')
    torchrun = '-m torch.distributed.run --nnodes=2 --node_rank=1 --master_addr=host'
    assert arguments_given(tmp_path, 'python', *command, **env) == [
        *torchrun.split(),
        '--master_port=29501',
        '--nproc_per_node=4',
        f'{ROOT}/tools/test.py',
        'my config.py',
        'my file.pth',
        '--launcher',
        'pytorch',
        '--cfg-options',
        'a="b c"',
    ]


@pytest.mark.parametrize(
    'script, last', [('train', '--work-dir=my file'), ('test', 'my file')], ids=['train', 'test']
)
def test_slurm_arguments(tmp_path, script, last):
    command = [f'slurm_{script}.sh', 'gpu', 'name', 'my config.py', 'my file', '--tta', 'b c']
    env = dict(PYTHON='python', GPUS='4', SRUN_ARGS='--time=1 --qos=low')
    env['PATH'] = f'{tmp_path}:/usr/bin:/bin'
    srun = (
        '--partition=gpu --job-name=name --gres=gpu:4 --ntasks=4 --ntasks-per-node=4 '
        '--cpus-per-task=5 --kill-on-bad-exit=1 --time=1 --qos=low python -u'
    )
    assert arguments_given(tmp_path, 'srun', *command, **env) == [
        *srun.split(),
        f'{ROOT}/tools/{script}.py',
        'my config.py',
        last,
        '--launcher=slurm',
        '--tta',
        'b c',
    ]


@pytest.mark.parametrize(
    ('launcher', 'names'),
    [
        ('pytorch', ['RANK', 'WORLD_SIZE', 'LOCAL_RANK']),
        ('slurm', ['SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID']),
        ('mpi', [f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK')]),
    ],
)
def test_names_of_a_process(monkeypatch, launcher, names):
    """Those of the launcher count, and are told apart from none at all."""
    environment = {'LOCAL_RANK': '7', **dict(zip(names, '582'))}
    monkeypatch.setattr(os, 'environ', environment)
    set_ranks(launcher)
    assert [environment[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['5', '8', '2']
    assert local_rank() == 2

    monkeypatch.setattr(os, 'environ', {})
    with pytest.raises(UserError, match=f'--launcher {launcher} goes with {names[0]}, which is not set'):
        set_ranks(launcher)


@pytest.mark.parametrize('machines', [1, 2])
def test_mpirun_names_no_first_machine(monkeypatch, machines):
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


def test_cpu_processes_keep_the_config(monkeypatch):
    """What a config says about the wrapper stays, and all synchronised norms are found."""
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


def test_synchronised_norms_of_one_process(tmp_path, monkeypatch):
    """MMEngine's runner makes plain ones of them."""
    pytest.importorskip('mmdet')
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
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


def test_synchronised_norms_of_a_backbone_alone():
    """Without other processes they are batch norms, forwards and backwards."""
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
