"""When the CPU implementation may replace the modules: one predicate, which returns why it may not.

The implementation computes what the modules would, as long as they are the ones it knows. So everything that
it does not read from the modules must be as it expects: classes, settings, which parameters there are, and
that nobody observes or changes what happens in between. Nothing is cached: a change counts from the next
call.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any, Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import GELU, Conv2d, Identity, LayerNorm, Linear, Module, Sequential, SiLU, SyncBatchNorm
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from .packed_linear import PackedLinear

VARIABLE = 'EMO2_MM_CPU_FASTPATH'

# torch 2.1 fallbacks
is_autocast: Callable[[], bool]
autocast_dtype: Callable[[], torch.dtype]
_is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)
if hasattr(torch.amp, 'is_autocast_available'):
    _torch: Any = torch  # the type hints of torch 2.1 lack these
    is_autocast = partial(_torch.is_autocast_enabled, 'cpu')
    autocast_dtype = partial(_torch.get_autocast_dtype, 'cpu')
else:
    is_autocast = torch.is_autocast_cpu_enabled
    autocast_dtype = torch.get_autocast_cpu_dtype


def _read_variable() -> bool:
    value = os.environ.get(VARIABLE, '1')
    if value not in ('0', '1'):
        raise ValueError(f'the environment variable {VARIABLE} is {value!r}; set it to 0 or 1')
    return value == '1'


_enabled = _read_variable()


def enable(on: bool) -> None:
    """Allow (the default) or forbid the CPU implementation, in the whole process.

    The environment variable ``EMO2_MM_CPU_FASTPATH=0`` forbids it from the start.
    """
    global _enabled
    _enabled = bool(on)


def is_enabled() -> bool:
    """Whether :func:`enable` allows the CPU implementation."""
    return _enabled


class _Classes:
    """The network's own classes, which this package may not import."""

    stem: type = type(None)
    block: type = type(None)
    attention: Any = type(None)
    drop_path: Any = type(None)
    forwards: tuple[Any, ...] = ()


def register(stem: type, block: type, attention: type[nn.Module], drop_path: type[nn.Module]) -> None:
    """Name the classes whose ``forward`` the CPU implementation computes; subclasses are not meant."""
    _Classes.stem, _Classes.block = stem, block
    _Classes.attention, _Classes.drop_path = attention, drop_path
    _Classes.forwards = (attention.forward, drop_path.forward)


def is_attention(module: nn.Module) -> bool:
    """Whether this is the network's attention, and no subclass of it."""
    return type(module) is _Classes.attention


def _functions() -> tuple[Any, ...]:
    return (
        Module.__call__, Sequential.forward, Identity.forward, Linear.forward, Conv2d.forward,
        Conv2d._conv_forward, _BatchNorm.forward, SyncBatchNorm.forward, LayerNorm.forward, SiLU.forward,
        GELU.forward, F.linear, F.conv2d, F.batch_norm, F.layer_norm, F.silu, F.gelu, F.pad,
        F.scaled_dot_product_attention,
    )  # fmt: skip


# What the modules compute with; libraries that replace one of these expect it to be called
_FUNCTIONS = _functions()

_TENSORS = frozenset((Tensor, nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_AUTOCAST_INPUTS = frozenset((torch.float32, torch.bfloat16, torch.float16))

# Classes of parts, and how many attributes an instance has. One more may hide what its class or
# ``register_parameter`` gives it, as one with these names does. On the meta device, layers draw no random
# numbers: an import must not change what a seeded program draws
_OVERRIDES = frozenset(
    ('forward', '_call_impl', '_wrapped_call_impl', '_compiled_call_impl', '_slow_forward', '_conv_forward')
    + ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked', '_check_input_dim')
)
_IDENTITY = {Identity: len(vars(Identity()))}
_SEQUENTIAL = {Sequential: len(vars(Sequential()))}
_LINEAR = {
    Linear: len(vars(Linear(1, 1, device='meta'))),
    PackedLinear: len(vars(PackedLinear(1, 1, device='meta'))),
}
_CONV = {Conv2d: len(vars(Conv2d(1, 1, 1, device='meta')))}
_LAYER_NORM = {LayerNorm: len(vars(LayerNorm(1)))}
_SILU = {SiLU: len(vars(SiLU()))}
_GELU = {GELU: len(vars(GELU()))}
# Names of attributes that a class of batch norms may add without computing anything else
_HARMLESS = frozenset(
    ('_check_input_dim', '__module__', '__qualname__', '__doc__', '__annotations__', '__parameters__')
    + ('__firstlineno__', '__static_attributes__', '__annotate_func__', '__annotations_cache__')
)


def observed(x: Tensor) -> str | None:
    """Why operations on ``x`` have to be the modules' own, or None if nothing records or transforms them."""
    if type(x) not in _TENSORS:
        return f'the input is a {type(x).__name__}, which may define operations of its own'
    if torch._C._is_tracing():
        return 'operations are traced'
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return 'a dispatch mode or function mode is active'
    if torch._C._are_functorch_transforms_active():
        return 'a transform of torch.func is active'
    if forward_ad._current_level >= 0:
        return 'forward-mode differentiation is active'
    return None


def why_not(module: nn.Module, x: Tensor) -> str | None:
    """Why the CPU implementation may not replace ``module(x)``; None if it may.

    Args:
        module: The stem or a block of an :class:`emo2_mm.EMOv2`.
        x: Its input.

    Returns:
        The first reason that was found, such as "depthwise has hooks".
    """
    if _is_compiling():  # first, for torch.compile takes it for a constant
        return 'the network is compiled or exported'
    if not _enabled:
        return f'it is switched off, by emo2_mm.cpu.enable(False) or {VARIABLE}=0'
    if not getattr(x, 'is_cpu', False):
        return f'the input is on {getattr(x, "device", "no device")}'
    reason = observed(x)
    if reason is not None:
        return reason
    if x.dtype not in _DTYPES or x.layout is not torch.strided or x.ndim != 4 or not x.numel():
        return f'the input has shape {tuple(x.shape)}, {x.dtype} and {x.layout}'
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return 'all modules have hooks'
    if _functions() != _FUNCTIONS:
        return 'a function of torch was replaced'
    if (_Classes.attention.forward, _Classes.drop_path.forward) != _Classes.forwards:
        return 'a forward function of emo2_mm was replaced'
    try:
        if type(module) is _Classes.block:
            return _why_not_block(module, x)
        if type(module) is _Classes.stem:
            return _why_not_stem(module, x)
    except KeyError as missing:
        return f'{type(module).__name__} or a part of it lacks {missing}'
    return f'{type(module).__name__} is neither the stem nor a block of EMOv2, but maybe derived from one'


def needs_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd has to record ``module(x)``."""
    return torch.is_grad_enabled() and (x.requires_grad or _has_trainable(module))


def _has_trainable(module: nn.Module) -> bool:
    """Whether a parameter requires a gradient; ``module.parameters()`` takes ten times as long."""
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        return True
    return any(m is not None and _has_trainable(m) for m in module._modules.values())


def _why_not_stem(stem: nn.Module, x: Tensor) -> str | None:
    modules: dict[str, Any] = stem._modules
    conv, norm, act = modules['conv'], modules['norm'], modules['act']
    depthwise, project = modules['depthwise'], modules['project']
    depthwise_norm, depthwise_act = modules['depthwise_norm'], modules['depthwise_act']
    if not vars(stem).keys().isdisjoint(modules):
        return 'an attribute of the stem hides one of its parts'
    trains = needs_gradients(stem, x)
    reason = (
        _why_not_conv('conv', conv, x, trains, 3)
        or _why_not_norm('norm', norm, trains)
        or _why_not_part('act', act, _SILU)
        or _why_not_conv('depthwise', depthwise, x, trains, 3, depthwise=True)
        or _why_not_norm('depthwise_norm', depthwise_norm, trains)
        or _why_not_part('depthwise_act', depthwise_act, _SILU)
    )
    if reason is not None:
        return reason
    if type(project) is Identity:
        reason = _why_not_part('project', project, _IDENTITY)
    else:
        reason = _why_not_conv('project', project, x, trains, 1)
        if reason is None and vars(project)['stride'] != (1, 1):
            return 'project has a stride'
    if reason is not None:
        return reason
    if vars(conv)['stride'] != (2, 2) or vars(depthwise)['stride'] != (1, 1):
        return 'conv or depthwise has another stride'
    if not trains:
        return 'autocast is active and no gradients are needed' if is_autocast() else None
    return (
        'depthwise has a bias and gradients are needed' if depthwise._parameters['bias'] is not None else None
    )


def _why_not_block(block: nn.Module, x: Tensor) -> str | None:
    state = vars(block)
    modules: dict[str, Any] = block._modules
    norm, expand, depthwise = modules['norm'], modules['expand'], modules['depthwise']
    depthwise_norm, depthwise_act = modules['depthwise_norm'], modules['depthwise_act']
    project, drop_path = modules['project'], modules['drop_path']
    if not state.keys().isdisjoint(modules) or 'layer_scale' in state:
        return 'an attribute of the block hides one of its parts'
    trains = needs_gradients(block, x)
    expands = _why_not_attention if type(expand) is _Classes.attention else _why_not_expand
    reason = (
        expands(expand, x, trains)
        or _why_not_norm('norm', norm, trains, layer_norm=True)
        or _why_not_conv('depthwise', depthwise, x, trains, 5, depthwise=True)
        or _why_not_norm('depthwise_norm', depthwise_norm, trains)
        or _why_not_part('depthwise_act', depthwise_act, _SILU)
        or _why_not_linear('project', project, x, trains)
        or _why_not_part('drop_path', drop_path, {_Classes.drop_path: None})
    )
    if reason is not None:
        return reason
    if state['residual'] and vars(depthwise)['stride'] != (1, 1):
        return 'the block has a residual and a stride'
    scale = state['_parameters']['layer_scale']
    if scale is not None and (type(scale) not in _TENSORS or scale.ndim > 1):
        return 'layer_scale is no vector'
    if not trains:
        dropping = vars(drop_path)
        if dropping['training'] and dropping['rate']:
            return 'drop_path drops'
        return 'autocast is active and no gradients are needed' if is_autocast() else None
    if type(depthwise_norm) is Identity:
        return 'it is deployed and gradients are needed'
    if depthwise._parameters['bias'] is not None or project._parameters['bias'] is not None:
        return 'depthwise or project has a bias and gradients are needed'
    return None


def _why_not_part(name: str, part: nn.Module, classes: Mapping[Any, int | None]) -> str | None:
    """Why this is no instance of one of some classes, or one that is hooked or overridden.

    Args:
        name: What to call it.
        part: The part.
        classes: Classes, and how many attributes an instance has unless something was attached to it.
    """
    state = part.__dict__
    if classes.get(type(part)) != len(state):
        if type(part) not in classes:
            return f'{name} is a {type(part).__name__}'
        if not state.keys().isdisjoint(_OVERRIDES) or not state.keys().isdisjoint(state['_modules']):
            return f'{name} has an own forward function or weight'
    if (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
    ):
        return f'{name} has hooks'
    return None


def _why_not_weights(name: str, layer: nn.Module, x: Tensor, trains: bool) -> str | None:
    """Why a linear layer or convolution has not the parameters that the input takes."""
    parameters: dict[str, Any] = layer._parameters
    weight, bias = parameters['weight'], parameters['bias']
    if type(weight) not in _TENSORS or (bias is not None and type(bias) not in _TENSORS):
        return f'{name} has a {type(weight).__name__} for a weight or a {type(bias).__name__} for a bias'
    if weight.dtype is not x.dtype and not (
        trains and weight.dtype is torch.float32 and x.dtype in _AUTOCAST_INPUTS and is_autocast()
    ):
        return f'{name} is in {weight.dtype}, the input in {x.dtype}'
    if trains and not (weight.is_cpu and weight.layout is torch.strided):
        return f'the weight of {name} is sparse or on another device'
    return None


def _why_not_linear(name: str, layer: nn.Module, x: Tensor, trains: bool) -> str | None:
    return _why_not_part(name, layer, _LINEAR) or _why_not_weights(name, layer, x, trains)


def _why_not_conv(
    name: str, conv: nn.Module, x: Tensor, trains: bool, kernel: int, depthwise: bool = False
) -> str | None:
    """Why this is no convolution with "same" padding and a stride of 1 or 2."""
    reason = _why_not_part(name, conv, _CONV) or _why_not_weights(name, conv, x, trains)
    if reason is not None:
        return reason
    state, half = conv.__dict__, kernel // 2
    if state['stride'] != (1, 1) and state['stride'] != (2, 2):
        return f'{name} has the stride {state["stride"]}'
    if state['padding'] != (half, half) or state['dilation'] != (1, 1) or state['padding_mode'] != 'zeros':
        return f'{name} has another padding or dilation'
    shape = state['_parameters']['weight'].shape
    if shape[2:] != (kernel, kernel):
        return f'{name} has a weight of shape {tuple(shape)}'
    if depthwise and (shape[1] != 1 or state['groups'] != shape[0]):
        return f'{name} is not depth-wise'
    return None


@lru_cache(maxsize=64)
def _is_plain_batch_norm(cls: type) -> bool:
    """Whether a class is one of torch's batch norms, or adds but a check of the input, as MMEngine's."""
    if cls is SyncBatchNorm or not issubclass(cls, _BatchNorm):
        return cls is SyncBatchNorm
    own = cls.__mro__[: cls.__mro__.index(_BatchNorm)]
    return all(vars(base).keys() <= _HARMLESS for base in own)


def _why_not_norm(name: str, norm: nn.Module, trains: bool, layer_norm: bool = False) -> str | None:
    cls: Any = type(norm)
    if cls is Identity:
        return _why_not_part(name, norm, _IDENTITY)
    state = norm.__dict__
    if cls is LayerNorm and layer_norm:
        if len(state['normalized_shape']) != 1:
            return f'{name} normalizes more than the channels'
        return _why_not_part(name, norm, _LAYER_NORM)
    if not _is_plain_batch_norm(cls):
        return f'{name} is a {cls.__name__}'
    mean, var = state['_buffers']['running_mean'], state['_buffers']['running_var']
    if (mean is None) != (var is None):
        return f'{name} has half of its statistics'
    if not trains and (state['training'] or mean is None):
        return f'{name} depends on the batch'
    if trains:
        if cls.forward is not _BatchNorm.forward and (cls is not SyncBatchNorm or state['training']):
            return f'{name} is a {cls.__name__} in training mode'
        for tensor in (mean, var, *state['_parameters'].values()):
            if tensor is not None and type(tensor) not in _TENSORS:
                return f'{name} has a {type(tensor).__name__}'
    return _why_not_part(name, norm, {cls: None})


def _why_not_expand(expand: nn.Module, x: Tensor, trains: bool) -> str | None:
    if type(expand) is not Sequential or [*expand._modules] != ['linear', 'act']:
        return 'expand is no linear layer and an activation'
    linear, act = expand._modules.values()
    return (
        _why_not_part('expand', expand, _SEQUENTIAL)
        or _why_not_linear('expand.linear', linear, x, trains)
        or (_why_not_gelu(act) if type(act) is GELU else _why_not_part('expand.act', act, _SILU))
    )


def _why_not_attention(expand: nn.Module, x: Tensor, trains: bool) -> str | None:
    modules: dict[str, Any] = expand._modules
    state = expand.__dict__
    qk, v = modules['qk'], modules['v']
    reason = (
        _why_not_part('expand', expand, {_Classes.attention: None})
        or _why_not_linear('expand.qk', qk, x, trains)
        or _why_not_linear('expand.v', v, x, trains)
        or _why_not_gelu(modules['act'])
    )
    if reason is not None:
        return reason
    qk, v, heads, size = qk._parameters, v._parameters, state['heads'], state['window_size']
    if qk['bias'] is None or v['bias'] is None:
        return 'expand.qk or expand.v has no bias'
    if type(heads) is not int or type(size) is not int or heads < 1 or size < 1:
        return f'expand has {heads} heads and windows of {size}'
    if qk['bias'].numel() % (2 * heads) or v['bias'].numel() % heads:
        return f'channels do not divide into {heads} heads'
    return None


def _why_not_gelu(act: nn.Module) -> str | None:
    if type(act) is GELU and act.__dict__['approximate'] != 'none':
        return 'expand.act is an approximate GELU'
    return _why_not_part('expand.act', act, _GELU)
