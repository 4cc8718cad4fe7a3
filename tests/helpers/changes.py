"""What users do to a backbone: settings, replaced layers, hooks, parametrizations and more."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Callable
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from emo2_mm import EMOv2
from emo2_mm.attention import SEWMHSA
from emo2_mm.emov2 import I2RMB

CONV, ATTEND, FIRST = 'stages.1.1', 'stages.2.1', 'stages.3.0'
PARTS = ('norm', 'depthwise', 'depthwise_norm', 'depthwise_act', 'project', 'expand', 'drop_path')

Change = Callable[[EMOv2, ExitStack], Any]


class Adapted(nn.Module):
    """A linear layer and what is trained next to it, as in low-rank adapters; it has no weight of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.full_like(layer.weight[:, 0], 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + 0.1


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NormAndReLU(nn.BatchNorm2d):
    """As timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ScaledNorm(nn.BatchNorm2d):
    """Its forward function is torch's, its weight is not."""

    @property
    def eps(self) -> float:
        return 0.5

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class OwnBlock(I2RMB):
    def _forward(self, x: Tensor) -> Tensor:
        return super()._forward(x).tanh()


class OwnAttention(SEWMHSA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Half(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class Subclass(Tensor):
    """A tensor with a multiplication of its own, as quantized and distributed ones have."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(function, types, args, kwargs or {})
        if function is F.linear:
            y = 2 * y
        return y.as_subclass(Tensor) if isinstance(y, Tensor) else y


def conv_like(conv: nn.Conv2d, cls: type = nn.Conv2d, **kwargs: Any) -> nn.Conv2d:
    settings = dict(kernel_size=5, stride=conv.stride, padding=2, groups=conv.groups, bias=False)
    return cls(conv.in_channels, conv.out_channels, **{**settings, **kwargs})


def replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Change:
    """Replace one part by what ``make`` makes of it."""

    def change(model: EMOv2, _: ExitStack) -> None:
        parent, _, child = name.rpartition('.')
        old = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, make(old).to(torch.double).train(old.training))

    return change


def on(name: str, function: Callable[[nn.Module], Any]) -> Change:
    """Apply a function to one part."""
    return lambda model, _: function(model.get_submodule(name))


def settings(name: str, **values: Any) -> Change:
    """Set attributes of one part."""
    return on(name, lambda m: [setattr(m, key, value) for key, value in values.items()])


def cls_of(name: str, cls: type) -> Change:
    return on(name, lambda m: setattr(m, '__class__', cls))


def patch(target: Any, name: str, factor: float = 2.0) -> Change:
    """Replace a function or method for everybody while the test runs."""
    original = getattr(target, name)

    def change(model: EMOv2, stack: ExitStack) -> None:
        stack.enter_context(mock.patch.object(target, name, lambda *a, **k: factor * original(*a, **k)))

    return change


def own_forward(m: nn.Module) -> None:
    forward = m.forward
    m.forward = lambda x: 2 * forward(x)


def own_conv_forward(m: nn.Conv2d) -> None:
    m._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias, m.stride, m.padding, 1, m.groups)


def hide_weight(m: nn.Module) -> None:
    """As sharding does: the parameter stays, and a view of it is used."""
    m.__dict__['weight'] = 2 * m._parameters['weight'].detach()


def observe(m: nn.Module) -> None:
    m.qconfig = quantization.QConfig(
        activation=quantization.MinMaxObserver.with_args(dtype=torch.quint8),
        weight=quantization.default_weight_observer,
    )
    quantization.prepare(m, inplace=True, observer_non_leaf_module_list=[])


def no_statistics(m: nn.Module) -> None:
    m.running_mean = m.running_var = m.num_batches_tracked = None


def global_hook(register: Callable[..., Any], cls: type, function: Callable[..., Any]) -> Change:
    def change(model: EMOv2, stack: ExitStack) -> None:
        handle = register(lambda m, *a: function(m, *a) if type(m) is cls else None)
        stack.callback(handle.remove)

    return change


def twice(m: nn.Module, *args: Any) -> Any:
    y = args[-1]
    return tuple(None if t is None else 2 * t for t in y) if isinstance(y, tuple) else 2 * y


CHANGES: dict[str, Change] = {
    # settings of a layer
    'dilation': settings(f'{CONV}.depthwise', dilation=(2, 2), padding=(4, 4)),
    'dilation where it attends': settings(f'{ATTEND}.depthwise', dilation=(2, 2), padding=(4, 4)),
    'stride 1': settings(f'{FIRST}.depthwise', stride=(1, 1)),
    'stride 1 as a number': settings(f'{FIRST}.depthwise', stride=1),
    'stride 3': settings(f'{FIRST}.depthwise', stride=(3, 3)),
    'stride (2, 1)': settings(f'{FIRST}.depthwise', stride=(2, 1)),
    'less padding': settings('stages.1.0.depthwise', padding=(1, 1)),
    'padding same': settings(f'{CONV}.depthwise', padding='same', padding_mode='zeros'),
    'padding mode': replace(f'{CONV}.depthwise', lambda m: conv_like(m, padding_mode='reflect')),
    'padding mode where it attends': replace(
        f'{ATTEND}.depthwise', lambda m: conv_like(m, padding_mode='circular')
    ),
    'kernel': replace(f'{ATTEND}.depthwise', lambda m: conv_like(m, kernel_size=3, padding=1)),
    'groups': replace(f'{CONV}.depthwise', lambda m: conv_like(m, groups=m.groups // 2)),
    'stride of the stem': settings('stem.conv', stride=(1, 1)),
    'padding mode of the stem': replace(
        'stem.conv', lambda m: nn.Conv2d(3, 4, 3, 2, padding=1, padding_mode='reflect')
    ),
    'kernel of the stem': replace('stem.conv', lambda m: nn.Conv2d(3, 4, 5, 2, padding=2)),
    'dilation of the stem': settings('stem.depthwise', dilation=(2, 2), padding=(2, 2)),
    # settings of a block
    'no residual': settings(CONV, residual=False),
    'no residual where it attends': settings(ATTEND, residual=False),
    'heads': settings(f'{ATTEND}.expand', heads=1),
    'window size': settings(f'{ATTEND}.expand', window_size=2),
    'drop path': settings(f'{CONV}.drop_path', rate=0.5),
    'drop path of another library': replace(f'{CONV}.drop_path', lambda m: nn.Tanh()),
    'no layer scale': settings(CONV, layer_scale=None),
    'scalar layer scale': settings(
        ATTEND, layer_scale=nn.Parameter(torch.tensor(0.7, dtype=torch.double))
    ),
    # parameters that are more or less
    'bias of project': replace(f'{CONV}.project', lambda m: nn.Linear(m.in_features, m.out_features)),
    'bias of project where it attends': replace(
        f'{ATTEND}.project', lambda m: nn.Linear(m.in_features, m.out_features)
    ),
    'bias of depthwise': replace(f'{CONV}.depthwise', lambda m: conv_like(m, bias=True)),
    'bias of the stem': replace('stem.project', lambda m: nn.Conv2d(4, 4, 1)),
    'bias of the depthwise stem': replace(
        'stem.depthwise', lambda m: conv_like(m, kernel_size=3, padding=1, bias=True)
    ),
    'no bias in the stem': settings('stem.conv', bias=None),
    'no bias of expand': settings(f'{CONV}.expand.linear', bias=None),
    'no bias of v': settings(f'{ATTEND}.expand.v', bias=None),
    'no bias of q and k': settings(f'{ATTEND}.expand.qk', bias=None),
    'no affine': settings(f'{CONV}.norm', weight=None, bias=None),
    'no weight of a norm': settings(f'{CONV}.depthwise_norm', weight=None),
    'no bias of a norm': settings(f'{CONV}.depthwise_norm', bias=None),
    'no weight of a layer norm': settings(f'{ATTEND}.norm', weight=None),
    # norms
    'eps': settings(f'{CONV}.depthwise_norm', eps=0.5),
    'eps of a layer norm': settings(f'{ATTEND}.norm', eps=0.5),
    'momentum': settings(f'{CONV}.depthwise_norm', momentum=0.7),
    'cumulative average': settings(f'{CONV}.depthwise_norm', momentum=None),
    'tracking off': settings(f'{CONV}.depthwise_norm', track_running_stats=False),
    'no statistics': on(f'{CONV}.depthwise_norm', no_statistics),
    'no statistics of the first norm': on(f'{CONV}.norm', no_statistics),
    'mode of a norm': on(f'{CONV}.depthwise_norm', lambda m: m.train(not m.training)),
    'mode of the stem': on('stem.norm', lambda m: m.train(not m.training)),
    'norm with an activation': cls_of(f'{CONV}.depthwise_norm', NormAndReLU),
    'norm with a property': cls_of(f'{CONV}.depthwise_norm', ScaledNorm),
    'instance norm': replace(f'{CONV}.depthwise_norm', lambda m: nn.InstanceNorm2d(m.num_features)),
    'group norm': replace(f'{ATTEND}.depthwise_norm', lambda m: nn.GroupNorm(2, m.num_features)),
    'no norm': replace(f'{CONV}.depthwise_norm', lambda m: nn.Identity()),
    'no first norm': replace(f'{CONV}.norm', lambda m: nn.Identity()),
    'layer norm over columns': replace(f'{CONV}.norm', lambda m: nn.LayerNorm((6, 12))),
    'layer norm': replace(f'{CONV}.norm', lambda m: nn.LayerNorm(12)),
    'reverted SyncBN': lambda m, _: setattr(
        m.stages[1], '1', revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(m.stages[1][1]))
    ),
    # activations
    'ReLU': replace(f'{CONV}.depthwise_act', lambda m: nn.ReLU()),
    'GELU': replace(f'{CONV}.expand.act', lambda m: nn.GELU()),
    'SiLU': replace('stages.2.0.expand.act', lambda m: nn.SiLU()),
    'SiLU in attention': replace(f'{ATTEND}.expand.act', lambda m: nn.SiLU()),
    'approximate GELU': settings(f'{ATTEND}.expand.act', approximate='tanh'),
    'approximate GELU in a first block': settings('stages.2.0.expand.act', approximate='tanh'),
    'no activation': replace('stages.2.0.expand.act', lambda m: nn.Identity()),
    'activation in place': settings(f'{CONV}.depthwise_act', inplace=True),
    'expand with more': on(f'{CONV}.expand', lambda m: m.append(nn.Tanh())),
    'expand in another order': on(
        f'{CONV}.expand', lambda m: m._modules.update(linear=m._modules.pop('linear'))
    ),
    # replaced layers and blocks
    'adapter of q and k': replace(f'{ATTEND}.expand.qk', Adapted),
    'adapter of v': replace(f'{ATTEND}.expand.v', Adapted),
    'adapter of project': replace(f'{CONV}.project', Adapted),
    'adapter of expand': replace(f'{CONV}.expand.linear', Adapted),
    'convolution of another class': cls_of(f'{CONV}.depthwise', Doubled),
    'attention of another class': cls_of(f'{ATTEND}.expand', OwnAttention),
    'block of another class': cls_of(ATTEND, OwnBlock),
    'one more block': lambda m, _: m.stages[1].append(nn.Tanh()),
    'one block less': lambda m, _: m.stages[3].__delitem__(1),
    # forward functions
    'own forward': on(f'{ATTEND}.expand.qk', own_forward),
    'own forward of an activation': on(f'{CONV}.depthwise_act', own_forward),
    'own forward of attention': on(f'{ATTEND}.expand', own_forward),
    'own forward of a block': on(CONV, own_forward),
    'own forward of a stage': on('stages.1', own_forward),
    'own convolution': on(f'{CONV}.depthwise', own_conv_forward),
    'hidden weight': on(f'{CONV}.project', hide_weight),
    'forward of a class': patch(nn.Linear, 'forward'),
    'forward of attention': patch(SEWMHSA, 'forward'),
    'forward of norms': patch(nn.LayerNorm, 'forward'),
    'a function': patch(F, 'silu'),
    # parametrizations
    'weight norm': on(f'{CONV}.project', lambda m: parametrizations.weight_norm(m, dim=None)),
    'spectral norm': on(f'{ATTEND}.expand.v', lambda m: parametrizations.spectral_norm(m).double()),
    'parametrization': on(
        f'{CONV}.depthwise', lambda m: parametrize.register_parametrization(m, 'weight', Half())
    ),
    'old weight norm': on(f'{CONV}.depthwise', weight_norm),
    'old spectral norm': on(f'{CONV}.project', spectral_norm),
    'pruning': on(f'{CONV}.project', lambda m: prune.l1_unstructured(m, 'weight', 0.5)),
    'pruned kernels': on('stem.depthwise', lambda m: prune.l1_unstructured(m, 'weight', 0.5)),
    'tensor subclass': on(
        f'{CONV}.project',
        lambda m: m._parameters.__setitem__('weight', m.weight.detach().as_subclass(Subclass)),
    ),
    'quantization': on(ATTEND, observe),
    # hooks
    'forward hook': on(f'{CONV}.depthwise', lambda m: m.register_forward_hook(twice)),
    'forward hook in attention': on(f'{ATTEND}.expand.act', lambda m: m.register_forward_hook(twice)),
    'forward hook of a block': on(ATTEND, lambda m: m.register_forward_hook(twice)),
    'forward hook of a stage': on('stages.1', lambda m: m.register_forward_hook(twice)),
    'forward hook of the stem': on('stem', lambda m: m.register_forward_hook(twice)),
    'forward hook in the stem': on('stem.act', lambda m: m.register_forward_hook(twice)),
    'pre hook': on(f'{CONV}.expand', lambda m: m.register_forward_pre_hook(twice)),
    'backward hook': on(
        f'{CONV}.depthwise', lambda m: m.register_full_backward_hook(lambda m, i, o: twice(m, i))
    ),
    'backward pre hook': on(f'{ATTEND}.expand', lambda m: m.register_full_backward_pre_hook(twice)),
    'global hook': global_hook(nn.modules.module.register_module_forward_hook, nn.Linear, twice),
    'global pre hook': global_hook(nn.modules.module.register_module_forward_pre_hook, nn.Conv2d, twice),
    'global backward hook': global_hook(
        nn.modules.module.register_module_full_backward_hook, nn.SiLU, lambda m, i, o: twice(m, i)
    ),
    # parameters
    'other weights': on(f'{CONV}.project', lambda m: m.weight.data.mul_(2)),
    'frozen weights': on(ATTEND, lambda m: m.requires_grad_(False)),
    'frozen norm': on(f'{CONV}.depthwise_norm', lambda m: m.requires_grad_(False)),
    'weights in another order': on(
        f'{CONV}.project', lambda m: setattr(m.weight, 'data', m.weight.data.t().contiguous().t())
    ),
}  # fmt: skip

# Changes that the fast path follows, in all modes or in some, for it reads them from the modules
FAST = {
    'stride 1', 'no residual', 'no residual where it attends', 'heads', 'window size', 'no layer scale',
    'scalar layer scale', 'no bias in the stem', 'no bias of expand', 'no affine', 'no weight of a norm',
    'no bias of a norm', 'no weight of a layer norm', 'eps', 'eps of a layer norm', 'momentum',
    'cumulative average', 'tracking off', 'reverted SyncBN', 'layer norm', 'GELU', 'SiLU',
    'activation in place', 'forward hook of a block', 'forward hook of a stage', 'forward hook of the stem',
    'own forward of a block', 'own forward of a stage', 'one more block', 'one block less', 'other weights',
    'frozen weights', 'frozen norm', 'weights in another order', 'no first norm', 'drop path',
    'bias of project', 'bias of project where it attends', 'bias of depthwise', 'bias of the stem',
    'bias of the depthwise stem', 'no statistics', 'no statistics of the first norm', 'mode of a norm',
    'mode of the stem', 'no norm',
}  # fmt: skip

# Changes that do not show in outputs, gradients or statistics
INVISIBLE = {'padding same', 'activation in place', 'reverted SyncBN', 'weights in another order'}
