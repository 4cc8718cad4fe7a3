"""Hooks of MMEngine's runner that training uses here."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

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
