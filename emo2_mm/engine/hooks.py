"""Hooks of MMEngine's runner for training and evaluation."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..emov2 import EMOv2
from ..errors import InvalidLossError


class CheckInvalidLossHook(Hook):
    """Stop at the first loss that is not finite, before that step is averaged or saved."""

    priority = 'VERY_HIGH'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if 'loss' in name and not math.isfinite(value):
                raise InvalidLossError(
                    f'step {runner.iter + 1}: {name} is {float(value)}. The checkpoints before it are '
                    'good: lower the learning rate, or clip gradients (optim_wrapper.clip_grad), and --resume'
                )


class SwitchToDeployHook(Hook):
    """Fold the batch norms of each :class:`emo2_mm.EMOv2` in the model before it is tested.

    In a config, ``custom_hooks = [dict(type='emo2_mm.engine.hooks.SwitchToDeployHook')]``. The averaged
    weights of an EMAHook are folded, too.
    """

    priority = 'LOWEST'  # after EMAHook has put the averaged weights in place

    def before_test_epoch(self, runner: Runner) -> None:
        averages = [hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')]
        for model in (runner.model, *averages):
            for module in list(model.modules()):
                if isinstance(module, EMOv2):
                    module.eval().switch_to_deploy()
