"""Backbones in which every weight counts, and those of the recordings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emo2_mm import EMOv2
from emo2_mm.weights.load import find_state_dict

from .golden import generated_state_dict, golden_cases

TINY = dict(
    depths=(1, 2, 2, 2),
    channels=(8, 12, 16, 24),
    expand_ratios=(2, 2.5, 3, 2),
    head_dim=8,
)
CASES = golden_cases()


def tiny(seed: int = 0, **kwargs: Any) -> EMOv2:
    """A small backbone in which every weight and statistic counts: see :func:`visible`."""
    torch.manual_seed(seed)
    return visible(EMOv2(TINY, window_size=3, **kwargs))


@torch.no_grad()
def visible(model: EMOv2) -> EMOv2:
    """Draw what begins as a constant: layer scale, weights, biases and statistics of norms."""
    for name, p in model.named_parameters():
        if name.endswith('layer_scale'):
            nn.init.uniform_(p, 0.3, 0.7)
        elif 'norm' in name and not name.startswith('norm'):  # the final one, alone, keeps its defaults
            nn.init.normal_(p, float(name.endswith('weight')), 0.1)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.8, 1.2)
    return model


def golden_model(case: dict[str, Any]) -> tuple[EMOv2, dict[str, Tensor]]:
    weights = find_state_dict(generated_state_dict(case['arch'], case['seed']))
    model = EMOv2(case['arch'], window_size=case['window_size'], final_norm=True)
    own = model.state_dict()
    model.load_state_dict({name: weights[name].reshape(own[name].shape) for name in own})
    return model.eval(), weights


def logits_of(model: EMOv2, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return model(x)[-1].mean((2, 3)) @ weights['head.fc.weight'].T + weights['head.fc.bias']


def name_of(case: dict[str, Any]) -> str:
    return f'{case["arch"]}-{case["size"][0]}x{case["size"][1]}'


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
