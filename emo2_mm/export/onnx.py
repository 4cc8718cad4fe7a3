"""Export a model to ONNX, compare it with torch and write it with the facts that its user needs."""

from __future__ import annotations

import io
import json
import logging
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..analysis.complexity import checked, default_shape
from ..analysis.timing import interleaved
from ..config import parse_options
from ..emov2 import EMOv2
from ..version import __version__
from ..weights.load import load_backbone_weights
from .int8 import accuracies, difference, find_images, prepared, quantize
from .onnx_network import OnnxEMOv2, import_onnx, replace, session, trace

LIMIT = 1e-4  # largest relative error of an output
ODD_SIZES = [(97, 64), (33, 250)]  # also tried with --dynamic; windows are padded, or larger than the map
COMPARED = 8  # images on which int8 is compared with fp32
HEAD_OUTPUTS = ('cls_score', 'bbox_pred', 'centerness')  # the last only of some


class Outputs(nn.Module):
    """A model, from normalised images to what is exported of it."""

    def __init__(self, model: nn.Module, scope: str | None) -> None:
        super().__init__()
        self.model, self.scope = model, scope

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        model = self.model
        if isinstance(model, (EMOv2, OnnxEMOv2)):
            return {f'stride_{4 * 2**i}': y for i, y in zip(model.out_indices, model(x))}
        if self.scope == 'mmpretrain':
            return dict(logits=model(x, mode='tensor'))
        if self.scope == 'mmseg':
            logits = model(x, mode='tensor')
            size, corners = x.shape[2:], model.align_corners
            return dict(logits=F.interpolate(logits, size, mode='bilinear', align_corners=corners))
        features = model.extract_feat(x)
        if not getattr(model, 'with_rpn', False):
            return by_level(HEAD_OUTPUTS, model.bbox_head(features))
        regions = by_level([f'rpn_{name}' for name in HEAD_OUTPUTS], model.rpn_head(features))
        return {**regions, **by_level(['feature'], [features])}


class Values(nn.Module):
    """:class:`Outputs` as a tuple, which is what can be traced."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(x).values())


def by_level(names: Iterable[str], outputs: Iterable[Iterable[Tensor]]) -> dict[str, Tensor]:
    return {f'{name}_{i}': y for name, levels in zip(names, outputs) for i, y in enumerate(levels)}


class Loaded(NamedTuple):
    """A model in eval mode with its weights, its inferencer and class names (none of a backbone alone)."""

    outputs: Outputs
    inferencer: Any
    classes: list[str] | None


def load(cfg: Config, checkpoint: str, backbone_only: bool) -> Loaded:
    """Build a config's model, or only its backbone, and load its weights, as data.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it cannot be read safely or does not hold the model's weights, or the backbone is not
            EMOv2.
    """
    if backbone_only:
        model = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
        inferencer = classes = None
    else:
        from ..apis import init_inferencer  # needs OpenCV and the library of the config

        inferencer = init_inferencer(cfg, checkpoint, 'cpu')
        model = inferencer.model
        classes = list((getattr(model, 'dataset_meta', None) or model._dataset_meta)['classes'])
    backbone = model if backbone_only else model.backbone
    if not isinstance(backbone, EMOv2):
        raise ValueError(f'{cfg.filename}: its backbone is {type(backbone).__name__}, not EMOv2')
    if backbone_only:
        load_backbone_weights(model, checkpoint)
    scope = cfg.get('default_scope')
    return Loaded(Outputs(revert_sync_batchnorm(model).eval(), scope).eval(), inferencer, classes)


def deployed(outputs: Outputs) -> Outputs:
    """A copy with folded weights."""
    outputs = deepcopy(outputs)
    model = outputs.model
    (model if isinstance(model, EMOv2) else model.backbone).switch_to_deploy()
    return outputs


@torch.no_grad()
def export(outputs: Outputs, shape: tuple[int, int], dynamic: bool) -> Any:
    """Trace a model to an ONNX graph, whose batch is free.

    Args:
        outputs: The model with folded weights; it is changed.
        shape: Height and width of the images.
        dynamic: Whether images may also have any other size.
    """
    replace(outputs, outputs.scope, dynamic)
    x = torch.randn(2, 3, *shape)
    found = outputs(x)
    axes = {'image': {0: 'batch', 2: 'height', 3: 'width'}}
    for name, y in found.items():
        sides = ('height', 'width') if name == 'logits' else (f'{name}_height', f'{name}_width')
        axes[name] = {0: 'batch', **(dict(zip((2, 3), sides)) if y.ndim == 4 else {})}
    if not dynamic:
        axes = {name: {0: 'batch'} for name in axes}
    return trace(Values(outputs), x, list(found), axes)


def describe(cfg: Config, loaded: Loaded, size: tuple[int, int] | None) -> dict[str, str]:
    """What someone who has only the file must know: texts, lists and numbers as JSON."""
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    swapped = any(settings.get(key) for key in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr'))
    multiple = settings.get('size_divisor') or settings.get('pad_size_divisor', 1)
    backbone = cfg.model.backbone
    versions = {'emo2_mm': __version__, 'torch': torch.__version__}
    for name in ('mmengine', 'mmcv', cfg.get('default_scope')):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    facts = {
        'arch': backbone.get('arch', '5m'),
        'window_size': backbone.get('window_size', 7),
        'config': Path(cfg.filename).name,
        'color_order': 'RGB' if swapped else 'BGR',
        'mean': list(settings.get('mean') or [0.0] * 3),  # of pixels of 0 to 255: (pixel - mean) / std
        'std': list(settings.get('std') or [1.0] * 3),
        'input_size': size or 'any',  # height, width
        'size_divisor': multiple,  # to which images are padded at right and bottom
        'versions': versions,
    }
    if loaded.classes:
        facts['classes'] = loaded.classes
    head = getattr(loaded.outputs.model, 'rpn_head', None) or getattr(loaded.outputs.model, 'bbox_head', None)
    if hasattr(head, 'prior_generator'):
        facts['strides'] = [list(pair) for pair in head.prior_generator.strides]
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


@torch.no_grad()
def errors(outputs: Outputs, onnx_session: Any, size: tuple[int, ...]) -> dict[str, float]:
    """How far onnxruntime is from torch: the norm of the difference relative to that of torch's output.

    Args:
        outputs: The model as it was loaded.
        onnx_session: See :func:`session`.
        size: Shape of the images.

    Returns:
        The error of each output; infinity where the shapes differ.
    """
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected = outputs(x)
    found = dict(zip(expected, map(torch.from_numpy, onnx_session.run(list(expected), {'image': x.numpy()}))))
    return {
        name: ((found[name] - y).norm() / y.norm()).item() if found[name].shape == y.shape else float('inf')
        for name, y in expected.items()
    }


def compare(outputs: Outputs, onnx_session: Any, sizes: list[tuple[int, ...]], console: Console) -> bool:
    """Print the errors for images of several sizes, and say whether all are within the limit."""
    found = [errors(outputs, onnx_session, size) for size in sizes]
    table = Table('output', *(' x '.join(map(str, size)) for size in sizes))
    for name in found[0]:
        table.add_row(name, *(f'{each[name]:.0e}' for each in found))
    console.print(f'onnxruntime against torch, relative errors (at most {LIMIT:.0e}), for images of')
    console.print(table)
    return all(error <= LIMIT for each in found for error in each.values())  # False for nan


@torch.no_grad()
def time_beside(
    networks: dict[str, nn.Module], sessions: dict[str, Any], size: tuple[int, ...], console: Console
) -> None:
    """Time networks of torch and onnxruntime in turns, and print the medians."""
    x = torch.randn(size)
    runs = {name: lambda network=network: network(x) for name, network in networks.items()}
    for name, one in sessions.items():
        runs[name] = lambda one=one: one.run(None, {'image': x.numpy()})
    rounds = list(interleaved(list(runs.values()), 'cpu'))
    threads = torch.get_num_threads()
    table = Table(f'{" x ".join(map(str, size))}, threads: {threads}, rounds: {len(rounds)}')
    for name in ('milliseconds', 'times as fast'):
        table.add_column(name, justify='right')
    for i, name in enumerate(runs):
        ratio = median(took[0] / took[i] for took in rounds)
        table.add_row(name, f'{1e3 * median(took[i] for took in rounds):.1f}', f'{ratio:.2f}')
    console.print(table)


def report_accuracy(
    cfg: Config, loaded: Loaded, sessions: dict[str, Any], inputs: Iterable[np.ndarray], console: Console
) -> None:
    """Print how far the int8 graph is from the other, and of a classifier the accuracy of both."""
    far = difference(*reversed(list(sessions.values())), inputs)
    console.print(f'int8: the outputs differ by {far:.1%} from those in fp32', highlight=False)
    if loaded.outputs.scope != 'mmpretrain':
        return
    found = accuracies(cfg, loaded.outputs.model, sessions.values())
    if found is None:
        console.print(f'no accuracy: the validation images of {cfg.filename} are not there', highlight=False)
        return
    each = ', '.join(f'{name} {top1:.2f} %' for name, top1 in zip(sessions, found[1]))
    console.print(f'top-1 of {found[0]} validation images: {each}', highlight=False)


def write(graph: Any, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(graph.SerializeToString())
    console.print(f'{path} ({path.stat().st_size / 1e6:.1f} MB)', soft_wrap=True, highlight=False)


def export_onnx(
    config: str,
    checkpoint: str,
    backbone: bool = False,
    shape: Sequence[int] | None = None,
    dynamic: bool = False,
    out: Path | None = None,
    quantize_on: Path | None = None,
    cfg_options: Sequence[str] | None = None,
) -> int:
    """Export a model and print how it compares with torch.

    Args:
        config: Config of MMPretrain, MMSegmentation or MMDetection.
        checkpoint: Its checkpoint; with ``backbone`` also released weights.
        backbone: Export the backbone alone.
        shape: Height and width of the images in pixels, or one number for both. Defaults to the size that
            the config tests at.
        dynamic: Take images of any size.
        out: File to write. Defaults to ``NAME_OF_CONFIG.onnx``.
        quantize_on: Folder of images; also write an int8 graph that is calibrated on them.
        cfg_options: ``KEY=VALUE`` texts that override settings of the config.

    Returns:
        The exit code: 0; 1 if onnxruntime and torch disagree, then no file is written; 2 if the arguments
        cannot be used.
    """
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        for name in ('onnx', 'onnxruntime'):
            import_onnx(name)
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(parse_options(cfg_options))
        if 'backbone' not in cfg.get('model', {}):
            raise ValueError(f'{config}: it has no model with a backbone')
        if quantize_on and backbone:
            raise ValueError('--quantize needs the whole model, to prepare images; leave out --backbone')
        images = find_images(quantize_on) if quantize_on else []
        shape = checked(shape) if shape else default_shape(cfg)
        with redirect_stdout(io.StringIO()):  # what the code bases say of weights
            loaded = load(cfg, checkpoint, backbone)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    fixed = None if dynamic else shape
    folded = deployed(loaded.outputs)
    graph = export(deepcopy(folded), shape, dynamic)
    import_onnx('onnx').helper.set_model_props(graph, describe(cfg, loaded, fixed))
    sessions = {'onnxruntime': session(graph)}
    sizes = [(1, 3, *shape), (3, 3, *shape)] + [(2, 3, *size) for size in ODD_SIZES if dynamic]
    if not compare(loaded.outputs, sessions['onnxruntime'], sizes, console):
        print('error: the graph does not compute what torch does; no file is written', file=sys.stderr)
        return 1
    name = Path(config).stem + ('_backbone' if backbone else '')
    out = out or Path(f'{name}.onnx')
    write(graph, out, console)
    if images:
        try:
            small = quantize(graph, prepared(images, loaded.inferencer, fixed))
        except ValueError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2
        sessions['onnxruntime, int8'] = session(small)
        write(small, out.with_name(f'{out.stem}_int8.onnx'), console)
        some = prepared(images[:COMPARED], loaded.inferencer, fixed)
        report_accuracy(cfg, loaded, sessions, some, console)
    time_beside({'torch': loaded.outputs, 'torch, folded': folded}, sessions, (1, 3, *shape), console)
    return 0
