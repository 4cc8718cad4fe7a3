"""Gradients by autograd itself, for the custom autograd functions of this package.

Their own backward passes call operators that have no derivative and write into memory, which is right for
training and nothing else. Where the gradient is to be differentiated again (``create_graph=True``) or
transformed, the function is computed again from its inputs by plain operations, which autograd records.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from .eligibility import observed


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether a backward pass has to consist of torch's public operations: it is recorded or transformed."""
    if torch.is_grad_enabled() or observed(grad) is not None:
        return True
    return 'Batched' in str(torch._C._dispatch_keys(grad))  # by torch.autograd.grad(is_grads_batched=True)


def plain_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """Compute the gradients of ``function(*inputs)``, None for what requires none.

    Args:
        function: Plain, differentiable operations.
        inputs: What the forward pass saved.
        grad: Gradient of the output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, for an input may depend on another one: a layer that is used twice
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        output = function(*aliases)
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]
