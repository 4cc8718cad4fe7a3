"""Processes that share a batch: their gradients are those of one process with all of it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest
import torch
from helpers.batches import make_batch
from helpers.processes import free_port
from helpers.tiny import CLASSIFIER, DETECTOR, SEGMENTOR, SIDE, run, write_config, write_data
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, DefaultScope
from torch import distributed
from torch.multiprocessing import spawn

pytestmark = [pytest.mark.slow, pytest.mark.both_stacks]
IMAGES = 4
SEGFORMER = SEGMENTOR.replace('FCNHead', 'SegformerHead').replace('num_convs=1, ', '')
SEGFORMER = SEGFORMER.replace(
    'in_channels=24, in_index=3', 'in_channels=[8, 12, 16, 24], in_index=[0, 1, 2, 3]'
)
CASES = {'mmdet': DETECTOR.replace('SyncBN', 'BN'), 'mmseg': SEGFORMER, 'mmpretrain': CLASSIFIER}


def read_model(scope: str, folder: Path) -> Config:
    """RetinaNet with frozen stages, SegFormer, or a classifier with its teacher; without random parts."""
    cfg = Config.fromfile(write_config(folder, CASES[scope])).model
    if scope == 'mmdet':
        cfg.backbone.frozen_stages = 2
    elif scope == 'mmseg':
        assert cfg.decode_head.type == 'SegformerHead'
        cfg.decode_head.dropout_ratio = 0.0
    else:
        from helpers.teacher import write_teacher

        cfg.type = 'emo2_mm.distill.DistilledImageClassifier'
        cfg.update(teacher=write_teacher(folder, 2), teacher_size=SIDE)
    return cfg


@contextmanager
def double() -> Iterator[None]:
    """Compute in float64: what differs then is no matter of rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@double()
def gradients(scope: str, cfg: Config, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of a process for its share of the batch, batch norms being in eval mode."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
    for module in model.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert not any(isinstance(m, torch.nn.Dropout) and m.p and m.training for m in model.modules())
    share = {name: values[rank::world] for name, values in make_batch(scope, IMAGES).items()}
    data = model.data_preprocessor(share, training=True)
    data['inputs'] = data['inputs'].double()  # normalised in float32
    network = model
    if world > 1:  # no find_unused_parameters
        network = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    losses = network(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {name: p.grad for name, p in trained.items()}


def work(rank: int, scope: str, cfg: Config, folder: str, port: str) -> None:
    address = f'tcp://127.0.0.1:{port}'
    distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    found = gradients(scope, cfg, rank, 2)
    torch.save(found, Path(folder, f'{rank}.pt'))
    distributed.destroy_process_group()


@pytest.mark.parametrize('scope', CASES)
def test_two_halves_give_the_gradients_of_the_whole(scope: str, tmp_path: Path) -> None:
    pytest.importorskip(scope)
    cfg = read_model(scope, tmp_path)
    whole = gradients(scope, cfg)
    assert any(name.startswith('backbone.') for name in whole)
    assert ('backbone.stem.conv.weight' in whole) == (scope != 'mmdet')
    spawn(work, (scope, cfg, str(tmp_path), free_port()), nprocs=2)
    halves = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for name, expected in whole.items():
        assert torch.equal(halves[0][name], halves[1][name])
        error = (halves[0][name] - expected).abs().max() / expected.abs().max().clamp(min=1e-8)
        # MMDetection counts boxes in float32: 7.5e-9 with the detector, 1e-11 with the others
        assert error <= 1e-7, (name, float(error))


DYING = """
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Die(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ['RANK'] == '1':
            raise MemoryError('this process has had enough')
"""


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    write_data(tmp_path)
    (tmp_path / 'dying.py').write_text(DYING)
    hook = "custom_imports = dict(imports=['dying'])\ncustom_hooks = [dict(type='Die')]\n"
    config = write_config(tmp_path, DETECTOR + hook)
    # ends long before gloo's time limit of 30 minutes, or `run` raises
    done = run(tmp_path, 'dist_train.sh', config, 2, PORT=free_port(), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert 'MemoryError: this process has had enough' in done.stderr
