"""When the CPU implementation may replace the modules: one predicate, which returns why it may not.

The implementation computes what the modules would, as long as they are the ones it knows. So everything that
it does not read from the modules must be as it expects: classes, settings, which parameters there are, and
that nobody observes or changes what happens in between. Nothing is cached: a change counts from the next
call.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from .packed_linear import PackedLinear

VARIABLE = 'EMO2_MM_CPU_FASTPATH'

# torch 2.1 fallbacks
_is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)
if hasattr(torch.amp, 'is_autocast_available'):
    is_autocast = partial(torch.is_autocast_enabled, 'cpu')
    autocast_dtype = partial(torch.get_autocast_dtype, 'cpu')
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
    attention: type = type(None)
    drop_path: type = type(None)
    forwards: tuple[Any, ...] = ()


def register(stem: type, block: type, attention: type, drop_path: type) -> None:
    """Name the classes whose ``forward`` the CPU implementation computes; subclasses are not meant."""
    _Classes.stem, _Classes.block = stem, block
    _Classes.attention, _Classes.drop_path = attention, drop_path
    _Classes.forwards = (attention.forward, drop_path.forward)


def is_attention(module: nn.Module) -> bool:
    """Whether this is the network's attention, and no subclass of it."""
    return type(module) is _Classes.attention


def _functions() -> tuple[Any, ...]:
    return (
        nn.Module.__call__, nn.Sequential.forward, nn.Identity.forward, nn.Linear.forward,
        nn.Conv2d.forward, nn.Conv2d._conv_forward, _BatchNorm.forward, nn.SyncBatchNorm.forward,
        nn.LayerNorm.forward, nn.SiLU.forward, nn.GELU.forward, F.linear, F.conv2d, F.batch_norm,
        F.layer_norm, F.silu, F.gelu, F.pad, F.scaled_dot_product_attention,
    )  # fmt: skip


# What the modules compute with; libraries that replace one of these expect it to be called
_FUNCTIONS = _functions()

_TENSORS = frozenset((Tensor, nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_AUTOCAST_INPUTS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_LINEAR = frozenset((nn.Linear, PackedLinear))
# An instance's own attribute of such a name replaces what its class or ``register_parameter`` has
_OVERRIDES = frozenset(
    ('forward', '_call_impl', '_wrapped_call_impl', '_compiled_call_impl', '_slow_forward', '_conv_forward')
    + ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked', '_check_input_dim')
)
_WEIGHT_AND_BIAS = frozenset(('weight', 'bias'))
_STATISTICS = frozenset(('running_mean', 'running_var', 'num_batches_tracked'))
_ONE_PIXEL = ((1, 1), (0, 0))  # stride, padding
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
    modules = stem._modules
    conv, norm, act = modules['conv'], modules['norm'], modules['act']
    depthwise, project = modules['depthwise'], modules['project']
    depthwise_norm, depthwise_act = modules['depthwise_norm'], modules['depthwise_act']
    deployed = type(project) is nn.Identity
    trains = needs_gradients(stem, x)
    reason = (
        _why_not_conv('conv', conv, x, trains, 3, 2)
        or _why_not_norm('norm', norm, x, trains)
        or _why_not_act('act', act, silu=True)
        or _why_not_conv('depthwise', depthwise, x, trains, 3, 1, depthwise=True)
        or _why_not_norm('depthwise_norm', depthwise_norm, x, trains)
        or _why_not_act('depthwise_act', depthwise_act, silu=True)
        or (
            _why_not_part('project', project)
            if deployed
            else _why_not_conv('project', project, x, trains, 1, 1)
        )
    )
    if reason is None and trains and depthwise._parameters['bias'] is not None:
        reason = 'depthwise has a bias and gradients are needed'
    return reason or _why_not_autocast(trains) or _why_not_hidden('the stem', stem.__dict__)


def _why_not_block(block: nn.Module, x: Tensor) -> str | None:
    modules = block._modules
    norm, expand, depthwise = modules['norm'], modules['expand'], modules['depthwise']
    depthwise_norm, depthwise_act = modules['depthwise_norm'], modules['depthwise_act']
    project, drop_path = modules['project'], modules['drop_path']
    parts = expand._modules if isinstance(expand, nn.Module) else {}
    attends = type(expand) is _Classes.attention
    trains = needs_gradients(block, x)
    if attends:
        reason = _why_not_attention(expand, parts, x, trains)
    else:
        reason = _why_not_expand(expand, parts, x, trains)
    reason = (
        reason
        or _why_not_norm('norm', norm, x, trains, layer_norm=True)
        or _why_not_conv('depthwise', depthwise, x, trains, 5, None, depthwise=True)
        or _why_not_norm('depthwise_norm', depthwise_norm, x, trains)
        or _why_not_act('depthwise_act', depthwise_act, silu=True)
        or _why_not_linear('project', project, x, trains)
        or _why_not_part('drop_path', drop_path, _Classes.drop_path)
        or _why_not_autocast(trains)
        or _why_not_hidden('the block', block.__dict__)
    )
    if reason is not None:
        return reason
    state = block.__dict__
    if state['residual'] and depthwise.__dict__['stride'] != (1, 1):
        return 'the block has a residual and a stride'
    scale = state['_parameters']['layer_scale']
    if scale is not None and (type(scale) not in _TENSORS or scale.ndim > 1 or not scale.is_cpu):
        return 'layer_scale is no vector on the CPU'
    if not trains:
        dropping = drop_path.__dict__
        return 'drop_path drops' if dropping['training'] and dropping['rate'] else None
    if type(depthwise_norm) is nn.Identity:
        return 'it is deployed and gradients are needed'
    if depthwise._parameters['bias'] is not None or project._parameters['bias'] is not None:
        return 'depthwise or project has a bias and gradients are needed'
    return None


def _why_not_autocast(trains: bool) -> str | None:
    return None if trains or not is_autocast() else 'autocast is active and no gradients are needed'


def _why_not_part(name: str, part: nn.Module, cls: type = nn.Identity, parts: int = 0) -> str | None:
    """Why this is not just an instance of a class, with so many parts and no parameters."""
    if type(part) is not cls:
        return f'{name} is a {type(part).__name__}'
    state = part.__dict__
    if state['_parameters'] or state['_buffers'] or len(state['_modules']) != parts:
        return f'{name} has more parts or parameters'
    return _why_not_called(name, state) or (_why_not_hidden(name, state) if parts else None)


def _why_not_hidden(name: str, state: dict[str, Any]) -> str | None:
    """Why an attribute of an instance hides one of its parts or parameters, or None if none does."""
    if state.keys().isdisjoint(state['_modules']) and state.keys().isdisjoint(state['_parameters']):
        return None
    return f'an attribute of {name} hides one of its parts'


def _why_not_called(name: str, state: dict[str, Any]) -> str | None:
    """Why a part has to be called."""
    if (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
    ):
        return f'{name} has hooks'
    if not state.keys().isdisjoint(_OVERRIDES):
        return f'{name} has an own forward function or weight'
    return None


def _why_not_act(name: str, act: nn.Module, silu: bool) -> str | None:
    if type(act) is nn.GELU and not silu:
        if act.__dict__['approximate'] != 'none':
            return f'{name} is an approximate GELU'
        return _why_not_part(name, act, nn.GELU)
    return _why_not_part(name, act, nn.SiLU)


def _why_not_weights(name: str, layer: nn.Module, x: Tensor, trains: bool) -> str | None:
    """Why a linear layer or convolution has other parameters than a weight and a bias of the input's type."""
    state = layer.__dict__
    parameters = state['_parameters']
    if parameters.keys() != _WEIGHT_AND_BIAS or state['_buffers'] or state['_modules']:
        return f'{name} has more than a weight and a bias'
    weight, bias = parameters['weight'], parameters['bias']
    for p in (weight,) if bias is None else (weight, bias):
        if type(p) not in _TENSORS or not p.is_cpu or p.layout is not torch.strided:
            return f'a parameter of {name} is a {type(p).__name__}, on another device or sparse'
        if p.dtype is not x.dtype and not (
            trains and p.dtype is torch.float32 and x.dtype in _AUTOCAST_INPUTS and is_autocast()
        ):
            return f'{name} is in {p.dtype}, the input in {x.dtype}'
    return _why_not_called(name, state)


def _why_not_linear(name: str, layer: nn.Module, x: Tensor, trains: bool) -> str | None:
    if type(layer) not in _LINEAR:
        return f'{name} is a {type(layer).__name__}'
    return _why_not_weights(name, layer, x, trains)


def _why_not_conv(
    name: str,
    conv: nn.Module,
    x: Tensor,
    trains: bool,
    kernel: int,
    stride: int | None,
    depthwise: bool = False,
) -> str | None:
    """Why this is no convolution with "same" padding; a stride of None is 1 or 2."""
    if type(conv) is not nn.Conv2d:
        return f'{name} is a {type(conv).__name__}'
    reason = _why_not_weights(name, conv, x, trains)
    if reason is not None:
        return reason
    state = conv.__dict__
    given, half = state['stride'], kernel // 2
    if given != (1, 1) and given != (2, 2) or stride is not None and given[0] != stride:
        return f'{name} has the stride {given}'
    if state['padding'] != (half, half) or state['dilation'] != (1, 1) or state['padding_mode'] != 'zeros':
        return f'{name} has another padding or dilation'
    shape = state['_parameters']['weight'].shape
    if len(shape) != 4 or shape[2] != kernel or shape[3] != kernel:
        return f'{name} has a weight of shape {tuple(shape)}'
    if depthwise and (shape[1] != 1 or state['groups'] != shape[0]):
        return f'{name} is not depth-wise'
    return None


@lru_cache(maxsize=64)
def _is_plain_batch_norm(cls: type) -> bool:
    """Whether a class is one of torch's batch norms, or adds but a check of the input, as MMEngine's."""
    if cls is nn.SyncBatchNorm or not issubclass(cls, _BatchNorm):
        return cls is nn.SyncBatchNorm
    own = cls.__mro__[: cls.__mro__.index(_BatchNorm)]
    return all(vars(base).keys() <= _HARMLESS for base in own)


def _why_not_norm(
    name: str, norm: nn.Module, x: Tensor, trains: bool, layer_norm: bool = False
) -> str | None:
    cls = type(norm)
    if cls is nn.Identity:
        return _why_not_part(name, norm)
    state = norm.__dict__
    if cls is nn.LayerNorm and layer_norm:
        if len(state['normalized_shape']) != 1:
            return f'{name} normalises more than the channels'
        buffers = frozenset()
    elif _is_plain_batch_norm(cls):
        buffers = _STATISTICS
        if cls.forward is not _BatchNorm.forward and (cls is not nn.SyncBatchNorm or state['training']):
            return f'{name} is a {cls.__name__} in training mode'
    else:
        return f'{name} is a {cls.__name__}'
    if state['_parameters'].keys() != _WEIGHT_AND_BIAS or state['_buffers'].keys() != buffers:
        return f'{name} has other parameters or statistics'
    for tensors in (state['_parameters'], state['_buffers']):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in _TENSORS or not tensor.is_cpu):
                return f'a tensor of {name} is a {type(tensor).__name__} or on another device'
    if buffers:
        mean, var = state['_buffers']['running_mean'], state['_buffers']['running_var']
        if (mean is None) != (var is None):
            return f'{name} has half of its statistics'
        if not trains and (state['training'] or mean is None):
            return f'{name} depends on the batch'
    return _why_not_called(name, state)


def _why_not_expand(expand: nn.Module, parts: dict[str, Any], x: Tensor, trains: bool) -> str | None:
    if list(parts) != ['linear', 'act']:
        return 'expand is no linear layer and an activation'
    return (
        _why_not_part('expand', expand, nn.Sequential, 2)
        or _why_not_linear('expand.linear', parts['linear'], x, trains)
        or _why_not_act('expand.act', parts['act'], silu=False)
    )


def _why_not_attention(expand: nn.Module, parts: dict[str, Any], x: Tensor, trains: bool) -> str | None:
    qk, v, act = parts['qk'], parts['v'], parts['act']
    reason = (
        _why_not_part('expand', expand, _Classes.attention, 3)
        or _why_not_linear('expand.qk', qk, x, trains)
        or _why_not_linear('expand.v', v, x, trains)
        or _why_not_act('expand.act', act, silu=False)
    )
    if reason is not None:
        return reason
    if type(act) is not nn.GELU:
        return 'expand.act is no GELU'
    if qk._parameters['bias'] is None or v._parameters['bias'] is None:
        return 'expand.qk or expand.v has no bias'
    heads, size = expand.__dict__['heads'], expand.__dict__['window_size']
    if type(heads) is not int or type(size) is not int or heads < 1 or size < 1:
        return f'expand has {heads} heads and windows of {size}'
    if qk._parameters['weight'].shape[0] % (2 * heads) or v._parameters['weight'].shape[0] % heads:
        return f'channels do not divide into {heads} heads'
    return None
