"""Hooks and optimizer constructors of OpenMMLab work with EMOv2, and the check for invalid losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers.tiny import CLASSIFIER, write_config, write_data
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from emo2_mm import EMOv2

pytestmark = pytest.mark.both_stacks


@pytest.mark.parametrize('final_norm', [True, False])
def test_layer_depths_count_the_stem_the_blocks_and_the_rest(final_norm):
    model = EMOv2('1m', final_norm=final_norm)
    depths = {name: model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {17}
    assert {depth for depth, _ in depths.values()} == set(range(17 if final_norm else 16))
    assert depths['stem.conv.weight'] == (0, 17)
    assert depths['stages.0.0.layer_scale'] == (1, 17)
    assert depths['stages.1.0.project.weight'] == (3, 17)
    assert depths['stages.3.2.project.weight'] == (15, 17)
    assert model.get_layer_depth('backbone.stages.2.7.norm.bias', 'backbone.') == (12, 17)
    for name in ('backbone.norm.weight', 'head.fc.weight', 'neck.stages.0.0.weight'):
        assert model.get_layer_depth(name, 'backbone.') == (16, 17)
    assert EMOv2('1m', out_indices=(1,)).get_layer_depth('stages.1.1.norm.bias') == (4, 6)


def test_layer_wise_decay_sets_learning_rates_by_depth(tiny):
    cfg = Config.fromfile(tiny('mmpretrain'))
    cfg.optim_wrapper.update(
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5, flat_decay_mult=0.0),
    )
    cfg.optim_wrapper.optimizer.weight_decay = 0.05
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
        model.backbone.stem.conv.bias.requires_grad_(False)
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups

    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {names[id(parameter)]: group['lr'] for group in groups for parameter in group['params']}
    assert sum(len(group['params']) for group in groups) == len(rates) == len(names)
    depths = {  # of 7: the stem, 1 + 1 + 2 + 1 blocks, the rest
        'backbone.stem.conv.weight': 0,
        'backbone.stages.0.0.layer_scale': 1,
        'backbone.stages.1.0.depthwise.weight': 2,
        'backbone.stages.2.0.expand.linear.weight': 3,
        'backbone.stages.2.1.norm.weight': 4,
        'backbone.stages.3.0.project.weight': 5,
        'backbone.norm.weight': 6,
        'head.fc.weight': 6,
    }
    assert {name: rates[name] for name in depths} == {n: 1e-3 * 0.5 ** (6 - d) for n, d in depths.items()}
    for group in groups:
        assert group['weight_decay'] == (0.05 if group['params'][0].ndim > 1 else 0)


class Spoil(Hook):
    """Makes the weights NaN before a step, as a step at too high a rate does."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 2:
            for parameter in runner.model.parameters():
                parameter.data.fill_(math.nan)


def test_a_loss_of_nan_ends_the_run_before_the_step_is_averaged_or_saved(call, tmp_path):
    write_data(tmp_path)
    average = "custom_hooks = [dict(type='EMAHook', momentum=0.5, priority='ABOVE_NORMAL')]\n"
    config = write_config(tmp_path, CLASSIFIER + average)
    runners = []

    class Keep(Spoil):
        def before_run(self, runner: Runner) -> None:
            runners.append(runner)

    with pytest.raises(SystemExit, match=r'error: step 3: loss is nan. The checkpoints before it are good'):
        call('train.py', config, '--cfg-options', 'train_cfg.max_epochs=3', hooks=(Keep(),))
    [averaged] = [hook.ema_model for hook in runners[0].hooks if type(hook).__name__ == 'EMAHook']
    assert all(value.isfinite().all() for value in averaged.state_dict().values())
    assert (tmp_path / 'work_dirs/tiny/epoch_1.pth').exists()
    assert not (tmp_path / 'work_dirs/tiny/epoch_2.pth').exists()
