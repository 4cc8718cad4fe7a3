"""Training and testing in several processes, started by the shell scripts."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.processes import free_port
from helpers.tiny import DETECTOR, run, write_config, write_data

pytestmark = pytest.mark.slow


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


def test_two_processes_share_the_images_and_end_with_the_same_weights(tmp_path):
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


def test_launches_on_two_machines_train_together(tmp_path):
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


def test_tasks_of_slurm_become_processes_on_the_cpu(tmp_path):
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


def test_missing_data_is_reported_by_one_process_and_the_launcher_fails(tmp_path):
    config = write_config(tmp_path, DETECTOR)
    result = run(tmp_path, 'dist_train.sh', config, 2, PORT=free_port())
    assert result.returncode != 0
    assert result.stderr.count('reads data that is not there') == 1
