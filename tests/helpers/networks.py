"""Small networks in which every weight counts, and ways to compare two of them."""

from __future__ import annotations

from typing import Any, Callable

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
    return visible(EMOv2(**{**dict(arch=TINY, window_size=3), **kwargs}))


@torch.no_grad()
def visible(model: EMOv2) -> EMOv2:
    """Randomise what starts as a constant: layer scale, weights, biases and statistics of norms."""
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


def deployed(**kwargs: Any) -> EMOv2:
    """:func:`tiny`, deployed."""
    model = tiny(**kwargs).eval()
    model.switch_to_deploy()
    return model


def golden_model(case: dict[str, Any]) -> tuple[EMOv2, dict[str, Tensor]]:
    """The backbone of a recorded case, and all of its weights."""
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
    """The norm of the difference of two tensors, relative to that of the second."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 1e-9) -> None:
    """The same names, and values within ``limit`` of the largest one."""
    assert ours.keys() == theirs.keys()
    scale = max((float(t.abs().max()) for t in theirs.values() if t.numel()), default=1.0)
    for name in ours:
        torch.testing.assert_close(
            ours[name],
            theirs[name],
            rtol=limit,
            atol=limit * 1e-2 * max(scale, 1.0),
            msg=lambda m, n=name: f'{n}: {m}',
        )


MODES = ('inference', 'gradients', 'training')


def results(model: EMOv2, x: Tensor, mode: str, steps: int = 1) -> dict[str, Tensor]:
    """Maps, and the gradients of all parameters and of the image, and statistics, after so many steps.

    Args:
        model: In whatever mode a change left its parts; it is not switched here.
        x: Images.
        mode: 'inference' (no gradients), 'gradients' (also of the image) or 'training'.
        steps: Forward and backward passes.
    """
    for step in range(steps):
        torch.manual_seed(step)  # of drop path
        model.zero_grad()
        x = x.detach().clone().requires_grad_(mode == 'gradients')
        with torch.set_grad_enabled(mode != 'inference'):
            maps = model(x)
        if mode != 'inference':
            generator = torch.Generator().manual_seed(step)
            loss = sum((m * torch.randn(m.shape, dtype=m.dtype, generator=generator)).sum() for m in maps)
            loss.backward()
    found = {f'map {i}': m.detach() for i, m in enumerate(maps)}
    found.update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found.update({n: b.double() for n, b in model.named_buffers() if b is not None})
    return found if x.grad is None else {**found, 'x': x.grad}


class Calls:
    """What :mod:`emo2_mm.cpu` was called for, while it is patched in."""

    def __init__(self, monkeypatch: Any) -> None:
        from emo2_mm import cpu

        self.modules: list[nn.Module] = []
        for name in ('stem', 'block'):
            monkeypatch.setattr(cpu, name, self.counting(getattr(cpu, name)))

    def counting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            self.modules.append(module)
            return function(module, x)

        return call
