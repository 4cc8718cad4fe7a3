"""Options of training, and mixed precision on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.tiny import CONFIGS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from emo2_mm.engine import training
from emo2_mm.engine.training import apply_options
from emo2_mm.errors import UserError

pytestmark = pytest.mark.both_stacks


def apply(cfg, **changes):
    apply_options(cfg, **{**dict(amp=False, auto_scale_lr=False, validate=True, resume=None), **changes})


def test_arguments_are_written_into_the_config(monkeypatch):
    monkeypatch.setattr(training, 'get_device', lambda: 'cuda')
    cfg = Config(dict(model={}, optim_wrapper=dict(type='OptimWrapper'), load_from='old.pth', val_cfg={}))
    with pytest.raises(UserError, match='auto_scale_lr.base_batch_size=N'):
        apply(cfg, auto_scale_lr=True)
    cfg.auto_scale_lr = ConfigDict(base_batch_size=16)
    apply(cfg, auto_scale_lr=True, amp=True, validate=False)
    assert cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper')
    assert cfg.val_cfg is None
    assert cfg.load_from == 'old.pth'
    apply(cfg, resume='auto')
    assert (cfg.resume, cfg.load_from) == (True, None)
    apply(cfg, resume='new.pth')
    assert (cfg.resume, cfg.load_from) == (True, 'new.pth')
    cfg.optim_wrapper.type = 'OtherWrapper'
    with pytest.raises(UserError, match="'OtherWrapper'"):
        apply(cfg, amp=True)


def test_mixed_precision_of_a_config_is_adapted_to_the_device(monkeypatch, capsys):
    monkeypatch.setattr(training, 'get_device', lambda: 'cpu')
    wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16', clip_grad={})
    cfg = Config(dict(model={}, optim_wrapper=wrapper))
    apply(cfg)
    assert cfg.optim_wrapper == dict(type='OptimWrapper', clip_grad={})
    assert 'full precision' in capsys.readouterr().out
    cfg.optim_wrapper.dtype = 'bfloat16'
    apply(cfg, amp=True)
    assert cfg.optim_wrapper == dict(type='emo2_mm.engine.optim_wrapper.BFloat16OptimWrapper', clip_grad={})
    assert capsys.readouterr().out == ''
    cfg.optim_wrapper = wrapper
    monkeypatch.setattr(training, 'get_device', lambda: 'cuda')
    for amp in (False, True):
        apply(cfg, amp=amp)
        assert cfg.optim_wrapper == wrapper


class Dtypes(Hook):
    """Keep the dtypes that layers compute in, and those of the gradients."""

    def before_train(self, runner: Runner) -> None:
        self.outputs: dict[str, set[torch.dtype]] = {}
        self.gradients: set[torch.dtype] = set()
        for layer in runner.model.modules():
            layer.register_forward_hook(self.keep)
        for parameter in runner.model.parameters():
            parameter.register_hook(lambda grad: self.gradients.add(grad.dtype))

    def keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer.training and isinstance(output, Tensor):
            self.outputs.setdefault(type(layer).__name__, set()).add(output.dtype)


def last_loss(runner: Runner) -> float:
    return runner.message_hub.get_scalar('train/loss').current()


@pytest.mark.parametrize('scope', CONFIGS)
def test_mixed_precision_on_a_cpu_is_bfloat16_with_float32_weights(tiny, call, scope):
    dtypes = Dtypes()
    runner = call('train.py', tiny(scope), '--amp', '--no-validate', hooks=(dtypes,))
    for layer in ('Conv2d', 'Linear'):
        assert dtypes.outputs[layer] == {torch.bfloat16}
    assert dtypes.outputs['LayerNorm'] == {torch.float32}
    assert dtypes.gradients == {torch.float32}
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}
    assert math.isfinite(last_loss(runner))


def test_mixed_precision_resumes_from_the_config_in_the_work_dir(tiny, call):
    call('train.py', tiny('mmpretrain'), '--amp', '--no-validate')
    more = ['--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=2']
    dtypes = Dtypes()
    runner = call('train.py', 'work_dirs/tiny/tiny.py', '--amp', *more, hooks=(dtypes,))
    assert (runner.epoch, runner.iter) == (2, 4)
    assert dtypes.outputs['Linear'] == {torch.bfloat16}


class Rate(Hook):
    """Keep the learning rate of the first step."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.__dict__.setdefault('first', runner.optim_wrapper.get_lr()['lr'])


@pytest.mark.parametrize('flags, factor', [([], 1), (['--auto-scale-lr'], 2 / 8)], ids=['off', 'on'])
def test_auto_scale_lr_scales_the_learning_rate_with_the_batch(tiny, call, flags, factor):
    config = tiny('mmpretrain', "auto_scale_lr['base_batch_size'] = 8")
    rate = Rate()
    call('train.py', config, '--no-validate', *flags, hooks=(rate,))
    assert set(rate.first) == {1e-3 * factor}
