"""Another project in another folder: a code base's own config with this backbone in it, in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.tiny import ROOT
from mmengine.utils import get_installed_path, is_installed

pytestmark = [pytest.mark.slow, pytest.mark.both_stacks]
# What such a project inherits and changes, beside the backbone's type and import.
PROJECTS = {
    'mmpretrain': """
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='TYPE', arch='1m', out_indices=(3,), final_norm=True),
    head=dict(in_channels=180),
)
""",
    'mmdet': """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='TYPE', arch='1m', window_size=10),
    neck=dict(in_channels=[32, 48, 80, 180]),
)
""",
    'mmseg': """
_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='TYPE', arch='1m', window_size=10),
    neck=dict(in_channels=[32, 48, 80, 180]),
)
""",
}
IMPORT = "custom_imports = dict(imports=['emo2_mm'], allow_failed_imports=False)\n"

PREDICTIONS = {
    'mmpretrain': '[tuple(p.pred_score.shape) for p in predictions] == [(1000,)] * 2',
    'mmdet': "['pred_instances' in p for p in predictions] == [True] * 2",
    'mmseg': '[tuple(p.pred_sem_seg.shape) for p in predictions] == [(64, 64)] * 2',
}

TRAIN = """
import sys
import torch
from helpers.batches import make_batch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner

torch.manual_seed(0)
torch.set_num_threads(1)
cfg = Config.fromfile('mine.py', import_custom_modules=False)
assert 'emo2_mm' not in sys.modules
cfg.work_dir = 'work'
if 'custom_imports' in cfg:
    try:
        Runner.from_cfg(cfg)
    except KeyError as error:
        print('without the import:', error)
    assert 'emo2_mm' not in sys.modules
    cfg = Config.fromfile('mine.py')
    cfg.work_dir, cfg.experiment_name = 'work', 'second'

runner = Runner.from_cfg(cfg)
model = revert_sync_batchnorm(runner.model)  # which has no kernel for CPUs
model.init_weights()
backbone = model.backbone
assert type(backbone).__module__ == 'emo2_mm.emov2', type(backbone)

if cfg.default_scope == 'mmseg':
    model.data_preprocessor.size = (64, 64)  # 512 x 512 would take long
batch = make_batch(cfg.default_scope, 2)
first = next(backbone.parameters())
before = first.detach().clone()
grads = {}
for name, parameter in backbone.named_parameters():
    parameter.register_hook(lambda grad, name=name: grads.update({name: grad}))
losses = model.train_step(batch, runner.build_optim_wrapper(cfg.optim_wrapper))
assert torch.stack([v for k, v in losses.items() if 'loss' in k]).isfinite().all(), losses
assert losses['loss'] > 0
assert set(grads) == {name for name, _ in backbone.named_parameters()}
assert all(grad.any() and grad.isfinite().all() for grad in grads.values())
assert not torch.equal(first, before)

with torch.no_grad():
    predictions = model.eval().test_step(batch)
assert PREDICTED
print('trained')
"""


@pytest.mark.parametrize('spelling', ['EMOv2', 'emo2_mm.EMOv2'])
@pytest.mark.parametrize('scope', PROJECTS)
def test_a_config_of_a_library_trains_with_the_backbone(scope: str, spelling: str, tmp_path: Path) -> None:
    if find_spec(scope) is None:
        pytest.skip(f'{scope} is not installed')
    project = PROJECTS[scope].replace('TYPE', spelling)
    if scope == 'mmseg' and not is_installed('mmsegmentation'):
        # MMEngine looks for `mmseg::` in a distribution of that name only, and the fork has another.
        project = project.replace('mmseg::', f'{get_installed_path(scope)}/.mim/configs/')
    imports = IMPORT if spelling == 'EMOv2' else ''
    (tmp_path / 'mine.py').write_text(imports + project)
    code = TRAIN.replace('PREDICTED', PREDICTIONS[scope])
    env = dict(os.environ, PYTHONPATH=str(ROOT / 'tests'), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith('trained\n')
    if imports:
        assert 'without the import: ' in done.stdout
        assert f'EMOv2 is not in the {scope}::model registry' in done.stdout
