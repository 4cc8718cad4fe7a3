"""Fold batch norms into the weights next to them, for inference."""

from __future__ import annotations

from itertools import chain
from typing import Any, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UserError


class FoldingError(UserError, RuntimeError):
    """Batch norms that cannot be folded, or folded weights for a network that is not, and vice versa."""


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies its channels by, and then adds to them.

    Raises:
        FoldingError: If it has no running statistics.
    """
    if norm.running_mean is None:
        raise FoldingError(
            'a batch norm with track_running_stats=False depends on the batch: it cannot be folded'
        )
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def fuse_conv_bn(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Let a convolution compute ``norm(conv(x))``, in place."""
    scale, shift = scale_and_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    conv.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype))  # the norm may be of higher precision


@torch.no_grad()
def scale_output(linear: nn.Linear, scale: Tensor) -> None:
    """Let a linear layer compute ``scale * linear(x)``, in place."""
    linear.weight.mul_(scale.view(-1, 1))
    if linear.bias is not None:
        linear.bias.mul_(scale)


@torch.no_grad()
def fuse_bn_linear(norm: nn.Module, linear: nn.Linear) -> None:
    """Let a linear layer compute ``linear(norm(x))``, in place."""
    scale, shift = scale_and_shift(norm)
    shift = linear.weight.to(shift.dtype) @ shift
    linear.bias = nn.Parameter(
        (shift if linear.bias is None else linear.bias + shift).to(linear.weight.dtype)
    )
    linear.weight.mul_(scale)


def _check_foldable(name: str, part: nn.Module, kind: type) -> None:
    """Refuse what folding would drop silently.

    Raises:
        FoldingError: If a part is of another class, or has hooks, parametrizations or its own ``forward``.
    """
    if kind is _BatchNorm:
        known = isinstance(part, _BatchNorm) and type(part).forward in (
            _BatchNorm.forward,
            nn.SyncBatchNorm.forward,
        )
    else:
        known = type(part) is kind
    if not known:
        raise FoldingError(f'{name} is a {type(part).__name__}: it cannot be folded, only a {kind.__name__}')
    hooked = (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )
    if hooked or 'forward' in part.__dict__ or part._parameters.keys() != {'weight', 'bias'}:
        raise FoldingError(
            f'{name} has hooks, other parameters than a weight and a bias, or a forward function of its own: '
            'it cannot be folded; remove them first'
        )
    if kind is _BatchNorm:
        if part.training:
            raise FoldingError(f'{name} is in training mode: it cannot be folded; call eval() first')
        scale_and_shift(part)


def _check_network(stem: Any, stages: Any) -> None:
    for name, kind in (
        ('conv', nn.Conv2d),
        ('norm', _BatchNorm),
        ('depthwise', nn.Conv2d),
        ('depthwise_norm', _BatchNorm),
        ('project', nn.Conv2d),
    ):
        _check_foldable(f'stem.{name}', getattr(stem, name), kind)
    project = stem.project
    if project.bias is not None or (project.kernel_size, project.stride, project.groups) != (
        (1, 1),
        (1, 1),
        1,
    ):
        raise FoldingError(f'stem.project is {project}: only a 1x1 convolution without a bias can be folded')
    if stages[0][0].residual:
        raise FoldingError('stages.0.0 has a residual: the last layer of the stem cannot be folded into it')
    _check_foldable('stages.0.0.norm', stages[0][0].norm, _BatchNorm)
    for i, j, block in ((i, j, block) for i, stage in enumerate(stages) for j, block in enumerate(stage)):
        name = f'stages.{i}.{j}'
        _check_foldable(f'{name}.depthwise', block.depthwise, nn.Conv2d)
        _check_foldable(f'{name}.depthwise_norm', block.depthwise_norm, _BatchNorm)
        _check_foldable(f'{name}.project', block.project, nn.Linear)
        if not isinstance(block.norm, nn.LayerNorm):
            _check_foldable(f'{name}.norm', block.norm, _BatchNorm)
            _check_foldable(f'{name}.expand.linear', block.expand.linear, nn.Linear)


@torch.no_grad()
def fold_network(stem: Any, stages: Any) -> None:
    """Fold the batch norms and layer scales of an EMOv2, and the stem's last layer, in place.

    Args:
        stem: A :class:`emo2_mm.emov2.Stem`.
        stages: Stages of :class:`emo2_mm.emov2.I2RMB`.

    Raises:
        FoldingError: If a part is not what it was built as, or a batch norm has no running statistics. Then
            nothing is changed.
    """
    _check_network(stem, stages)
    fuse_conv_bn(stem.conv, stem.norm)
    fuse_conv_bn(stem.depthwise, stem.depthwise_norm)
    stem.norm = stem.depthwise_norm = nn.Identity()
    for block in chain(*stages):
        fuse_conv_bn(block.depthwise, block.depthwise_norm)
        block.depthwise_norm = nn.Identity()
        if not isinstance(block.norm, nn.LayerNorm):
            fuse_bn_linear(block.norm, block.expand.linear)
            block.norm = nn.Identity()
        scale_output(block.project, block.layer_scale)
        block.layer_scale = None
    # the first block has no residual: nothing but its linear layer follows the stem's
    linear = stages[0][0].expand.linear
    linear.weight = nn.Parameter(linear.weight @ stem.project.weight[:, :, 0, 0])
    stem.project = nn.Identity()


def check_folding(state_dict: Mapping[str, Any], prefix: str, deployed: bool) -> None:
    """Refuse folded weights for a network that is not folded, and the other way round.

    Args:
        state_dict: Weights, maybe of a whole model.
        prefix: What the names of the backbone's weights begin with there.
        deployed: Whether the network is folded.

    Raises:
        FoldingError: If they do not go together; the message says which is which.
    """
    if not deployed and f'{prefix}stem.depthwise.bias' in state_dict:
        raise FoldingError(
            'the weights are deployed ones, saved after switch_to_deploy(), but this EMOv2 is built for '
            'training; build it with deploy=True (in a config: model.backbone.deploy=True)'
        )
    if deployed and f'{prefix}stem.project.weight' in state_dict:
        raise FoldingError(
            'the weights are those of training, with batch norms, but this EMOv2 is deployed; load them '
            'without deploy=True and call switch_to_deploy() afterwards'
        )
