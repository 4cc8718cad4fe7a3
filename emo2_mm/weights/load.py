"""Load backbone weights from released files and checkpoints of OpenMMLab.

Three steps: read the file (:func:`emo2_mm.weights.read.read_checkpoint`), find its state dict and rename the
keys to those of :class:`emo2_mm.EMOv2` (:func:`find_state_dict`), match names and shapes
(:func:`match_weights`).
"""

from __future__ import annotations

import os
import re
from typing import Any, Dict, Mapping

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..fold import check_folding
from .read import read_checkpoint

Weights = Dict[str, Tensor]

# Keys of the state dict, in order of preference. When MMEngine's EMAHook saves, 'state_dict' holds the
# averaged weights and 'ema_state_dict' the raw ones, so the latter is used only if it is alone.
WRAPPERS = ('net_E', 'net', 'state_dict_ema', 'state_dict', 'ema_state_dict')

# Released name -> name in EMOv2, applied in this order; names of EMOv2 stay as they are.
RENAMES = (
    (r'^stage0\.0\.(conv|norm)\.', r'stem.\1.'),
    (r'^stage0\.1\.conv\.', 'stem.depthwise.'),
    (r'^stage0\.1\.norm\.', 'stem.depthwise_norm.'),
    (r'^stage0\.2\.conv\.', 'stem.project.'),
    *((rf'^stage{i + 1}\.(\d+)\.', rf'stages.{i}.\1.') for i in range(4)),
    (r'\.eops\.0\.net\.conv\.', '.expand.linear.'),
    (r'\.eops\.0\.(qk|v)\.conv\.', r'.expand.\1.'),
    (r'\.conv_local\.conv\.', '.depthwise.'),
    (r'\.conv_local\.norm\.', '.depthwise_norm.'),
    (r'\.proj\.conv\.', '.project.'),
    (r'\.ls\.gamma$', '.layer_scale'),
    (r'(^|\.)norm\.norm\.', r'\1norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


def load_backbone_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load the weights of a file into a backbone, in place.

    Args:
        model: An :class:`emo2_mm.EMOv2`; its dtype and device stay.
        path: A released file or a checkpoint of MMPretrain, MMDetection, MMSegmentation or
            MMEngine: a local path or an ``http(s)://`` address.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file cannot be read safely, or does not contain the model's weights.
    """
    content = read_checkpoint(path)
    try:
        matched = match_weights(find_state_dict(content), model)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    own = model.state_dict()
    for name, tensor in matched.items():
        own[name].copy_(tensor)
    print_log(f'Loaded {len(matched)} tensors of the backbone from {path}', logger='current')


def find_state_dict(content: Any) -> Weights:
    """Find the state dict in the content of a file, with the names of the backbone.

    Args:
        content: A state dict, or a dict that has one under a key of ``WRAPPERS``.

    Returns:
        Name to tensor. From a checkpoint of a whole model it keeps the backbone, without its prefix, and
        the linear classifier ``head.fc``.

    Raises:
        ValueError: If there is no state dict.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f'it contains a {type(content).__name__}, not a state dict')
    candidates = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    for candidate in [*candidates, content]:
        weights = {
            re.sub(r'^((module|_orig_mod)\.)+', '', name): value
            for name, value in candidate.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        if weights:
            break
    else:
        raise ValueError(f'it contains no weights; its keys are: {_some(content)}')
    if any(name.startswith('backbone.') for name in weights):
        weights = {
            re.sub(r'^backbone\.((module|_orig_mod)\.)*', '', name): value
            for name, value in weights.items()
            if name.startswith(('backbone.', 'head.fc.'))
        }
    return {_rename(name): value for name, value in weights.items()}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def match_weights(weights: Weights, model: nn.Module) -> Weights:
    """Match names and shapes with a backbone; raise if anything is missing.

    Parts that the model does not have are dropped: the classifier, the final norm, later stages, and the
    step counter of an averaged model.

    Args:
        weights: Result of :func:`find_state_dict`.
        model: An :class:`emo2_mm.EMOv2`; it is not changed.

    Returns:
        A tensor for each parameter and buffer of the model; ``num_batches_tracked`` only if the file has it.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape; the message lists them.
    """
    check_folding(weights, '', getattr(model, 'deployed', False))
    own = model.state_dict()
    matched, missing, misshaped = {}, [], []
    for name, target in own.items():
        tensor = _reshape(weights[name], target.shape) if name in weights else None
        if tensor is not None:
            matched[name] = tensor
        elif name in weights:
            misshaped.append(f'{name} {tuple(weights[name].shape)} for {tuple(target.shape)}')
        elif not name.endswith('num_batches_tracked'):
            missing.append(name)
    unexpected = [name for name in weights if name not in own and not _unused(name, own)]
    if not (missing or misshaped or unexpected):
        return matched

    required = [name for name in own if not name.endswith('num_batches_tracked')]
    fitting = sum(name in matched for name in required)
    lines = [f'{fitting} of {len(required)} weights of {type(model).__name__} were found']
    for label, names in (
        ('missing', missing),
        ('unexpected', unexpected),
        ('of another shape (file for model)', misshaped),
    ):
        if names:
            lines.append(f'{len(names)} {label}: {_some(names)}')
    settings: Any = model.arch_settings
    arch = find_arch(weights, settings)
    if arch and arch != find_arch(own, settings):
        lines.append(f'the file contains arch {arch!r}; set arch={arch!r}')
    elif arch and misshaped:
        lines.append(
            f'the file has the depths and channels of arch {arch!r} but other shapes, as a network '
            'for other input or EMO (version 1) would'
        )
    elif not fitting:
        lines.append('these are the weights of another network')
    raise ValueError('\n  '.join(lines))


def _reshape(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """Reshape a 1x1 convolution to a linear weight, (1, C, 1, 1) to (C,); None if the shapes do not match."""
    published = {1: (1, *shape, 1, 1), 2: (*shape, 1, 1)}.get(len(shape))
    return tensor.reshape(shape) if tuple(tensor.shape) in (shape, published) else None


def _unused(name: str, own: Weights) -> bool:
    """Whether a weight belongs to a part that a backbone with the state dict ``own`` does not have."""
    stage = re.match(r'stages\.[0-3]\.', name)
    if stage:
        return not any(known.startswith(stage[0]) for known in own)
    return name.startswith(('head.', 'norm.')) or name == 'steps'


def find_arch(weights: Weights, arch_settings: dict[str, dict[str, Any]]) -> str | None:
    """Name of the arch with the depths and channels of these weights; None if there is none."""
    sizes: dict[int, tuple[int, ...]] = {}  # stage: depth, channels
    for name, tensor in weights.items():
        found = re.match(r'stages\.(\d+)\.\d+\.project\.weight$', name)
        if found:
            stage = int(found[1])
            depth = sizes[stage][0] if stage in sizes else 0
            sizes[stage] = (depth + 1, *tensor.shape[:1])
    for arch, settings in arch_settings.items():
        expected = dict(enumerate(zip(settings['depths'], settings['channels'])))
        if sizes and sizes.items() <= expected.items():
            return arch
    return None


def classifier_state_dict(weights: Weights, backbone: nn.Module) -> Weights:
    """Make the state dict of an MMPretrain ``ImageClassifier`` with a ``LinearClsHead``.

    Args:
        weights: Result of :func:`find_state_dict`.
        backbone: An :class:`emo2_mm.EMOv2` with ``final_norm=True``; it is not changed.

    Raises:
        ValueError: If the classifier is missing, or the weights do not match the backbone.
    """
    head = {name: weights.get(name) for name in ('head.fc.weight', 'head.fc.bias')}
    if any(tensor is None for tensor in head.values()):
        raise ValueError(
            'it has no classifier head (head.weight and head.bias), like files of detection and '
            'segmentation; only classification files can be converted'
        )
    matched = match_weights(weights, backbone)
    state_dict = {
        f'backbone.{name}': matched.get(name, tensor).to(tensor.dtype)
        for name, tensor in backbone.state_dict().items()
    }
    return {name: tensor.clone() for name, tensor in {**state_dict, **head}.items()}


def _some(names: Any, limit: int = 4) -> str:
    names = [str(name) for name in names]
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '') or 'none'
