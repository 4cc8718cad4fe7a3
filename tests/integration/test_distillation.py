"""Training with a teacher: resumed, by the tools, and with the teacher of the configs."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import CLASSIFIER, ROOT, SIDE, run, write_config, write_data
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

pytest.importorskip('mmpretrain')
from helpers.teacher import batch, losses_of, write_teacher  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402

pytestmark = pytest.mark.slow


def write_distilled(folder: Path) -> Config:
    """A config that trains on the tiny data, with moving average and teacher."""
    write_data(folder)
    cfg = Config.fromfile(write_config(folder, CLASSIFIER))
    cfg.model.type = 'emo2_mm.distill.DistilledImageClassifier'
    cfg.model.update(teacher=write_teacher(folder, 2), teacher_size=SIDE)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    return cfg


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    cfg = write_distilled(tmp_path)
    for stage in ('val', 'test'):
        cfg.update({f'{stage}_{part}': None for part in ('cfg', 'dataloader', 'evaluator')})

    def train(name: str, epochs: int, resume: bool = False) -> dict[str, Any]:
        part = deepcopy(cfg)
        part.train_cfg.max_epochs, part.resume = epochs, resume
        part.work_dir, part.experiment_name = str(tmp_path / name), f'{tmp_path.name}-{name}-{epochs}'
        Runner.from_cfg(part).train()
        return torch.load(tmp_path / name / f'epoch_{epochs}.pth', map_location='cpu', weights_only=False)

    whole = train('whole', 2)
    train('parts', 1)
    resumed = train('parts', 2, resume=True)
    plain = MODELS.build(dict(Config.fromfile(tmp_path / 'tiny.py').model))
    for kind in ('state_dict', 'ema_state_dict'):
        keys = [k.replace('module.', '') for k in whole[kind] if k != 'steps']
        assert keys == list(plain.state_dict())
        assert all(torch.equal(value, resumed[kind][key]) for key, value in whole[kind].items())
    assert len(whole['optimizer']['state']) == len(list(plain.parameters()))


def test_tools_train_and_evaluate(tmp_path: Path) -> None:
    """The config alone brings the classifier in; evaluation goes without the teacher's file."""
    write_distilled(tmp_path).dump(tmp_path / 'kd.py')
    done = run(tmp_path, 'train.py', 'kd.py', '--work-dir', 'work')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'loss_cls: ' in done.stdout + done.stderr and 'loss_kd: ' in done.stdout + done.stderr
    (tmp_path / 'teacher.pth').unlink()
    results = []
    for config in ('kd.py', 'tiny.py'):
        done = run(tmp_path, 'test.py', config, 'work/epoch_1.pth', '--work-dir', config[:-3])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        text = done.stdout + done.stderr
        assert 'do not match' not in text and 'unexpected key' not in text and 'missing key' not in text
        results.append(re.search('accuracy/top1: ([0-9.]+)', text).group(1))
    assert results[0] == results[1]


def test_the_teacher_of_the_configs_trains_a_student(tmp_path: Path) -> None:
    """All but its weights, which are random here, from a file."""
    timm = pytest.importorskip('timm')
    cfg = Config.fromfile(ROOT / 'configs/cls/emo2_1m_kd.py')
    torch.manual_seed(0)
    network = timm.create_model(cfg.model.teacher.model_name)
    pretrained_cfg = network.pretrained_cfg
    assert pretrained_cfg['input_size'] == (3, cfg.model.teacher_size, cfg.model.teacher_size)
    assert (pretrained_cfg['mean'], pretrained_cfg['std']) == ((0.0,) * 3, (1.0,) * 3)
    torch.save(network.state_dict(), tmp_path / 'tresnet.pth')
    cfg.model.teacher.update(pretrained=False, checkpoint_path=str(tmp_path / 'tresnet.pth'))
    cfg.model.data_preprocessor = cfg.data_preprocessor
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    data = batch(images=2, side=96)
    losses = losses_of(model, data)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = F.interpolate(data['inputs'].flip(1) / 255, (224, 224), mode='bilinear')
    with torch.no_grad():
        scores = network.eval()(plain)
    assert torch.allclose(model.teacher(data['inputs'].float()), scores, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) == 1_460_844
