"""Which way a map takes: the plain one, or one that only a CPU takes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.nn.modules.batchnorm import _BatchNorm

# The second of each is torch 2.1's
_is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)
if hasattr(torch.amp, 'is_autocast_available'):
    _autocasts_on_cpu = partial(torch.is_autocast_enabled, 'cpu')
else:
    _autocasts_on_cpu = torch.is_autocast_cpu_enabled


def is_traced() -> bool:
    """Whether operations are recorded (exported, counted, compiled): then they shall be the plain ones."""
    return torch.jit.is_tracing() or _is_compiling()


def has_hooks(m: nn.Module) -> bool:
    """Whether hooks watch or change what a module computes."""
    if m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks:
        return True
    return 'forward' in m.__dict__  # some libraries put their own there


def is_hooked(*modules: nn.Module) -> bool:
    """Whether hooks watch or change what modules or their parts compute: then each shall be called once."""
    # m.modules() takes longer
    return any(has_hooks(m) or is_hooked(*m._modules.values()) for m in modules if m is not None)


def any_module_is_hooked() -> bool:
    """Whether hooks watch or change what all modules compute, of whatever network."""
    return bool(module._global_forward_pre_hooks or module._global_forward_hooks)


def is_watched(x: Tensor) -> bool:
    """Whether something stands between ``x`` and torch's operators that may not know the private ones.

    Such as a counter of operations, autocast, a transform of torch.func, or a tensor that only has a shape.
    """
    records = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return records or type(x) is not Tensor or _autocasts_on_cpu()


def runs_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is on a CPU, and what is done with it is not recorded."""
    return x.device.type == 'cpu' and not is_traced()


def infers_on_cpu(x: Tensor) -> bool:
    """Whether, moreover, nothing will ask for gradients."""
    return not torch.is_grad_enabled() and runs_on_cpu(x)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether, moreover, ``x`` will be asked for its gradient."""
    return x.requires_grad and runs_on_cpu(x)


def normalises_alone(norm: nn.Module) -> bool:
    """Whether this is a batch norm that does no more, such as asking other processes for their statistics."""
    return isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward
