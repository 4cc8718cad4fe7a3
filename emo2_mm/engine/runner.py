"""Build the runner of a config, also for several processes without a GPU."""

from __future__ import annotations

import os
import subprocess

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..config import iter_nodes
from ..errors import UserError, note

NO_BFLOAT16_NMS = "mmcv's NMS does not support bfloat16, which --amp uses on a CPU; leave --amp out"
SYNC_BN = ('SyncBN', 'MMSyncBN', 'NaiveSyncBN')


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config. Without a GPU, the processes of a launcher run on CPUs (gloo)."""
    if cfg.launcher != 'none' and get_device() == 'cpu':
        _use_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def _use_cpu_processes(cfg: Config) -> None:
    """Initialize processes and wrap the model for CPUs; MMEngine's runner does so for GPUs only."""
    if not torch.distributed.is_initialized():
        if cfg.launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
            command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
            os.environ['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]
        elif 'MASTER_ADDR' not in os.environ:  # mpirun does not set it
            if os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') != os.environ['WORLD_SIZE']:
                raise UserError(
                    '--launcher mpi on several machines needs the first of them: mpirun -x MASTER_ADDR=HOST'
                )
            os.environ['MASTER_ADDR'] = '127.0.0.1'
        os.environ.setdefault('MASTER_PORT', '29500')
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.setdefault('device_ids', None)
    cfg.model_wrapper_cfg = wrapper

    cfg.pop('sync_bn', None)
    norms = [node for _, node in iter_nodes(cfg.model, 'model') if node.get('type') in SYNC_BN]
    for norm in norms:
        norm['type'] = 'BN'
    if norms:
        note(f'No GPU: {len(norms)} SyncBN of the config became BN, with statistics of each process.')
