"""Arguments that the shell scripts pass to the programs they start."""

from __future__ import annotations

import pytest
from helpers.processes import arguments_given
from helpers.tiny import ROOT, run


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
def test_missing_arguments_print_the_usage(tmp_path, command):
    result = run(tmp_path, *command)
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ')
    assert command[0] in result.stderr


def test_dist_scripts_pass_arguments_to_torchrun(tmp_path):
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
def test_slurm_scripts_pass_arguments_to_srun(tmp_path, script, last):
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
