"""Mixed precision in bfloat16 for training on a CPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast


class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision on a CPU, which MMEngine's ``AmpOptimWrapper`` does not support.

    Bfloat16 has the range of float32, so no loss scale is needed. A config names it
    ``type='emo2_mm.engine.optim_wrapper.BFloat16OptimWrapper'``; arguments are those of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Run the operators on autocast's list in bfloat16; weights and gradients stay float32."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
