"""The options of the custom configs (``configs/*/*_custom.py``), and what each of them sets.

An option is one name for one wish, such as ``image_size``; many settings of a config follow from it. What is
given by MMEngine's names, such as ``train_dataloader.batch_size=4``, takes precedence over what follows here.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from ..config import innermost_dataset, iter_nodes
from ..emov2 import EMOv2
from ..errors import UserError
from ..weights.read import read_checkpoint
from ..weights.released import imagenet_weights

ARCHS = tuple(EMOv2.arch_settings)
DROP_PATH_RATES = {'1m': 0.04036, '2m': 0.05, '5m': 0.05, '20m': 0.1, '50m': 0.2}
STAGES = ('train', 'val', 'test')
# Without a GPU: long side of the images (of maps and classifiers: the side), and batch size
CPU_SIZES = {'RetinaNet': 512, 'MaskRCNN': 512, 'EncoderDecoder': 256, 'ImageClassifier': 128}
CPU_BATCHES = {
    **{'RetinaNet': 4, 'MaskRCNN': 4, 'SingleStageDetector': 8},
    **{'EncoderDecoder': 4, 'ImageClassifier': 32},
}
MIN_SIZE = 32  # one token of the last stage
LIGHT_CHANNELS = 96
IMAGES_SEEN = 15000  # in a training whose length is not given, within these bounds
EPOCHS = (12, 100)
WARM_UP = 100  # steps, but at most a tenth of all
# Options, and settings that say the same
SAME = {
    'arch': 'model.backbone.arch',
    'pretrained': 'model.backbone.init_cfg.checkpoint',
    'max_epochs': 'train_cfg.max_epochs',
    'batch_size': 'train_dataloader.batch_size',
    'lr': 'optim_wrapper.optimizer.lr',
}


class Options(NamedTuple):
    """The options of a custom config, checked; None where the value is chosen here."""

    data_format: str
    data_root: Path
    arch: str | dict[str, Any]
    val_fraction: float | None = None
    image_size: tuple[int, int] | None = None  # height, width
    pretrained: str | None = 'imagenet'
    max_epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    light_head: bool | None = None
    tensorboard: bool = False


def take_options(cfg: Config, given: dict[str, Any], file: Config) -> Options:
    """Remove the options from a custom config, and check them.

    A setting that means the same as an option, such as ``model.backbone.arch``, counts as that option.

    Args:
        cfg: A custom config, which is changed.
        given: Settings of the command line, by name.
        file: The config without them.

    Raises:
        UserError: If two settings contradict each other, or a value is unusable.
    """
    values = {name: cfg.pop(name) for name in Options._fields if name in cfg}
    for name, key in SAME.items():
        if key not in given:
            continue
        if values[name] != file[name] and values[name] != given[key]:
            raise UserError(
                f'{name}={values[name]} and {key}={given[key]} contradict each other: give one of them'
            )
        values[name] = given[key]
    if 'max_iters' in cfg.train_cfg:
        raise UserError('train_cfg.max_iters: a custom config counts epochs; give max_epochs=N')
    _keep_settings_of_file(values, given, file)

    values['data_root'] = Path(str(values['data_root'])).expanduser()
    if not isinstance(values['arch'], dict):
        values['arch'] = _arch(values['arch'])
    values['image_size'] = _size(values['image_size'])
    values['pretrained'] = _pretrained(values['pretrained'])
    for name in ('max_epochs', 'batch_size'):
        values[name] = _number(name, values[name], lambda x: isinstance(x, int) and x > 0, '1 or more')
    values['lr'] = _number('lr', values['lr'], lambda x: x > 0, 'a rate above 0')
    values['val_fraction'] = _number(
        'val_fraction', values['val_fraction'], lambda x: 0 < x < 1, 'a share between 0 and 1, such as 0.2'
    )
    for name in ('light_head', 'tensorboard'):
        if values.get(name) not in (None, True, False):
            raise UserError(f'{name} is {values[name]!r}; give True or False')
    return Options(**values)


def _keep_settings_of_file(values: dict[str, Any], given: dict[str, Any], file: Config) -> None:
    """What a config made from a custom one sets by itself is what it wants."""
    backbone = file.model.backbone
    init = given.get('model.backbone.init_cfg', backbone.get('init_cfg')) or {}
    published = imagenet_weights(backbone.arch) if isinstance(backbone.arch, str) else None
    changed = init.get('checkpoint') != published or 'model.backbone.init_cfg' in given
    if values['pretrained'] == file.pretrained == 'imagenet' and 'pretrained' not in given and changed:
        values['pretrained'] = given.get('model.backbone.init_cfg.checkpoint', init.get('checkpoint'))
    if isinstance(backbone.arch, dict) or (backbone.arch != file.arch and values['arch'] == file.arch):
        values['arch'] = backbone.arch


def _arch(arch: Any) -> str:
    name = str(arch).lower()
    if name not in ARCHS:
        raise UserError(f'arch is {arch!r}; give one of {", ".join(ARCHS)}')
    return name


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    numbers = size.lower().replace('x', ',').split(',') if isinstance(size, str) else size
    numbers = [numbers] * 2 if isinstance(numbers, int) else numbers
    try:
        height, width = (int(str(number).strip()) for number in numbers)
    except (TypeError, ValueError):
        raise UserError(f'image_size is {size!r}; give one number of pixels, or height,width') from None
    if min(height, width) < MIN_SIZE:
        raise UserError(f'image_size is {size!r}; both sides need {MIN_SIZE} pixels or more')
    return height, width


def _pretrained(value: Any) -> str | None:
    if value is None or str(value).lower() in ('none', 'false', ''):
        return None
    return str(value)


def _number(name: str, value: Any, good: Callable[[Any], bool], what: str) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value):
        raise UserError(f'{name} is {value!r}; give {what}')
    return value


# ---------------------------------------------------------------- the network


def set_arch(model: ConfigDict, before: str, arch: str) -> None:
    """Set the backbone's arch and drop path rate, and the channels of the neck and the heads after it.

    Args:
        model: The config of the model, which is changed.
        before: The arch that its channels are of.
        arch: The arch to set.
    """
    old, new = (EMOv2.arch_settings[name]['channels'] for name in (before, arch))
    swapped = dict(zip(old, new))
    for key, part in iter_nodes(model, 'model'):
        for name in ('in_channels', 'out_channels'):
            value = part.get(name)
            if key == 'model.backbone' or value is None:
                continue
            many = isinstance(value, (list, tuple))
            part[name] = type(value)(swapped.get(x, x) for x in value) if many else swapped.get(value, value)
        if part.get('type') == 'SegformerHead':
            part.channels = 180 if arch == '1m' else 288  # as published
    model.backbone.update(arch=arch, drop_path_rate=DROP_PATH_RATES[arch])


def set_light_head(model: ConfigDict) -> None:
    """Lessen the channels of an FPN and of the head on it, and what else takes most of the time."""
    channels = LIGHT_CHANNELS
    model.neck.out_channels = channels
    if model.type == 'RetinaNet':
        model.bbox_head.update(in_channels=channels, feat_channels=channels, stacked_convs=2)
        return
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = channels
    roi.bbox_head.update(in_channels=channels, fc_out_channels=256)
    roi.mask_head.update(in_channels=channels, conv_out_channels=channels, num_convs=2)
    model.train_cfg.rcnn.sampler.num = 128
    for part in (model.train_cfg.rpn_proposal, model.test_cfg.rpn):
        part.max_per_img = 300


def head_of_checkpoint_is_light(file: str | None) -> bool | None:
    """Whether a detector to go on from has a light head; None if there is none, or it says nothing."""
    if not file or '://' in file or not Path(file).expanduser().is_file():
        return None
    content = read_checkpoint(file)
    weights = content.get('state_dict', content)
    weight = weights.get('neck.lateral_convs.0.conv.weight') if isinstance(weights, dict) else None
    return None if weight is None else weight.shape[0] == LIGHT_CHANNELS


def set_pretrained(
    backbone: ConfigDict, arch: str | dict[str, Any], pretrained: str | None, goes_on: bool
) -> str:
    """Set the weights that the backbone starts from.

    Args:
        backbone: The config of the backbone, which is changed.
        arch: Its arch.
        pretrained: ``imagenet``, a file or an address, or None for random weights.
        goes_on: Whether all weights come from another checkpoint (``load_from``).

    Returns:
        What it starts from, in words.
    """
    published = imagenet_weights(arch) if isinstance(arch, str) else None
    file = published if pretrained == 'imagenet' else pretrained
    if goes_on and pretrained in ('imagenet', None):
        backbone.init_cfg = None
        return 'the checkpoint of load_from'
    if file is None:
        # A factor of 1e-6 would hide each branch for longer than a training on few images lasts
        backbone.update(init_cfg=None, layer_scale_init_value=0.1)
        if 'frozen_stages' in backbone:
            backbone.update(frozen_stages=-1, norm_eval=False)
        return 'random weights' + f' (none are released of {arch})' * (pretrained == 'imagenet')
    backbone.init_cfg = ConfigDict(type='Pretrained', checkpoint=file)
    return file


# ---------------------------------------------------------------- sizes of images


def set_image_size(cfg: Config, size: tuple[int, int]) -> None:
    """Set the size that images are trained and evaluated at, and what depends on it.

    That is each pipeline (with that of test-time augmentation), crops and padding, the side of the attention
    windows, and the anchors.

    Args:
        cfg: The config, which is changed.
        size: Height and width in pixels. Detectors other than SSDLite keep the proportions of an image, which
            fits into them; segmentors resize its shorter side to the smaller one and train on crops.
    """
    pipelines = [innermost_dataset(cfg[f'{stage}_dataloader'].dataset).pipeline for stage in STAGES]
    pipelines.append(cfg.get('tta_pipeline') or [])
    steps = [step for pipeline in pipelines for _, step in iter_nodes(pipeline, '')]
    if cfg.default_scope == 'mmdet':
        _size_detector(cfg, steps, size)
    elif cfg.default_scope == 'mmseg':
        _size_segmentor(cfg, steps, size)
    else:
        _size_classifier(steps, size)
    cfg.model.backbone.window_size = window_size(*size, classifies=cfg.default_scope == 'mmpretrain')


def own_size(cfg: Config, given: dict[str, Any]) -> bool:
    """Whether the images have another size than that of the published recipe."""
    if any(key.split('.')[-1] in ('scale', 'crop_size', 'size') for key in given):
        return True
    step = innermost_dataset(cfg.test_dataloader.dataset).pipeline[1]
    return step.get('scale') not in ((1333, 800), (320, 320), (2048, 512), 256)


def _size_detector(cfg: Config, steps: list[ConfigDict], size: tuple[int, int]) -> None:
    height, width = size
    resizes = [step for step in steps if step.get('type') == 'Resize']
    old_width, old_height = resizes[0].scale
    for step in resizes:  # those of test-time augmentation have other sizes
        step.scale = tuple(
            round(side * new / old)
            for side, new, old in zip(step.scale, (width, height), (old_width, old_height))
        )
    # objects in smaller images are smaller; the root, since large ones must still be covered
    shrunk = min(1.0, math.sqrt(max(size) / 1333))
    for name in ('bbox_head', 'rpn_head'):
        generator = cfg.model.get(name, {}).get('anchor_generator', {})
        if generator.get('type') == 'SSDAnchorGenerator':
            generator.update(ssd_anchors(height, width))
        elif generator.get('octave_base_scale'):
            generator.octave_base_scale = max(1, round(generator.octave_base_scale * shrunk))
        elif generator.get('scales'):
            generator.scales = [max(1, round(scale * shrunk)) for scale in generator.scales]


def ssd_anchors(height: int, width: int) -> dict[str, list]:
    """Strides and sizes of SSDLite's anchors: those published for 320 x 320, in proportion.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        Arguments of ``SSDAnchorGenerator``: ``strides`` as (width, height) in pixels of the six maps,
        ``min_sizes`` and ``max_sizes`` in pixels.
    """
    strides = []
    rows, columns = math.ceil(height / 16), math.ceil(width / 16)
    for _ in range(6):
        strides.append((round(width / columns), round(height / rows)))
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    edges = [round(edge * min(height, width) / 320) for edge in (48, 100, 150, 202, 253, 304, 320)]
    return dict(strides=strides, min_sizes=edges[:-1], max_sizes=edges[1:])


def _size_segmentor(cfg: Config, steps: list[ConfigDict], size: tuple[int, int]) -> None:
    for step in steps:
        if step.get('type') in ('Resize', 'RandomResize') and 'scale' in step:
            step.scale = (4 * min(size), min(size))  # as 2048 x 512: the longer side is all but free
        elif 'crop_size' in step:
            step.crop_size = tuple(size)
    cfg.model.data_preprocessor.size = tuple(size)


def _size_classifier(steps: list[ConfigDict], size: tuple[int, int]) -> None:
    height, width = size
    for step in steps:
        kind = step.get('type')
        if kind == 'RandomResizedCrop':
            step.scale = height if height == width else (height, width)
            if height != width:  # crops of the shape that they are resized to
                step.aspect_ratio_range = (3 / 4 * width / height, 4 / 3 * width / height)
        elif kind == 'ResizeEdge' and height == width:
            step.scale = round(height / 0.875)
        elif kind == 'ResizeEdge':
            backend = dict(backend=step.backend, interpolation=step.interpolation)
            step.clear()
            step.update(type='Resize', scale=(round(width / 0.875), round(height / 0.875)), **backend)
        elif kind == 'CenterCrop':
            step.crop_size = height if height == width else (width, height)


def window_size(height: int, width: int, classifies: bool = False) -> int:
    """Choose the side of the attention windows.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        classifies: Whether all images have this size; else it is their largest.

    Returns:
        10, as published for detection and segmentation, or the side of the last map if that is smaller; for
        classification the side from 6 to 10 that pads the maps least (7 at 224, 8 at 256 and 512).
    """
    side = math.ceil(max(height, width) / 32)
    if side <= 10 or not classifies:
        return min(side, 10)

    def padded(window: int) -> float:
        sides = [math.ceil(n / stride) for n in (height, width) for stride in (16, 32)]
        return sum(math.ceil(n / window) * window / n for n in sides)

    return min(range(10, 5, -1), key=padded)


# ---------------------------------------------------------------- batches, rate, length


def set_workers(cfg: Config) -> int:
    """Start no more processes that load data than there are cores for; return the number for training."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    here = max(1, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    most = max(1, cores // here // (1 if get_device() != 'cpu' else 2))  # the rest computes
    for stage in STAGES:
        loader = cfg[f'{stage}_dataloader']
        loader.num_workers = min(loader.num_workers, most)
    return cfg.train_dataloader.num_workers


def usual_batch(cfg: Config, file: Config) -> int:
    """The batch size of the config; without a GPU a smaller one, unless it is not the recipe's."""
    batch = cfg.train_dataloader.batch_size
    recipe = batch == file.auto_scale_lr.base_batch_size
    return CPU_BATCHES.get(cfg.model.type, batch) if recipe and get_device() == 'cpu' else batch


def set_batch(cfg: Config, batch: int, images: int) -> int:
    """Set the batch size, and leave out the last, smaller batch: batch norm cannot learn from one value.

    Args:
        cfg: The config, which is changed.
        batch: Wanted batch size of each process.
        images: Number of training images.

    Returns:
        The batch size: no larger than what each process has of the images.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    loader = cfg.train_dataloader
    loader.batch_size = max(1, min(batch, images // world))
    if not loader.get('batch_sampler'):
        loader.drop_last = True
    return loader.batch_size


def set_lr(cfg: Config, lr: float | None) -> str:
    """Set the learning rate; if none is given, that of the config times the root of (batch size / its own).

    The square root is the rule for Adam (arXiv 2205.10287). The batch size is that of all processes and
    accumulated steps. ``--auto-scale-lr`` finds the rate as meant for the actual batch size then.

    Returns:
        The rate and why, in words.
    """
    optimizer = cfg.optim_wrapper.optimizer
    if lr is not None:
        optimizer.lr = lr
        return f'{lr:g}'
    world = int(os.environ.get('WORLD_SIZE', 1))
    total = cfg.train_dataloader.batch_size * world * cfg.optim_wrapper.get('accumulative_counts', 1)
    base = cfg.auto_scale_lr.base_batch_size
    if total == base:
        return f'{optimizer.lr:g}'
    before, optimizer.lr = optimizer.lr, float(f'{optimizer.lr * math.sqrt(total / base):.3g}')
    cfg.auto_scale_lr.base_batch_size = cfg.train_dataloader.batch_size * world
    return f'{optimizer.lr:g} ({before:g} x sqrt({total} / {base}), the batch sizes)'


def set_schedule(cfg: Config, epochs: int | None, images: int) -> int:
    """Set the length of training and of the schedule where the config leaves them open.

    Args:
        cfg: The config, which is changed; its batch size is final.
        epochs: Wanted length, or None for that of the config, or as many as make 15,000 images.
        images: Number of training images.

    Returns:
        The number of epochs.
    """
    own = cfg.train_cfg.get('max_epochs')
    epochs = epochs or own or min(max(round(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])
    cfg.train_cfg.max_epochs = epochs
    world = int(os.environ.get('WORLD_SIZE', 1))
    steps = epochs * max(1, images // (cfg.train_dataloader.batch_size * world))
    for scheduler in cfg.param_scheduler:
        if scheduler.get('end', ...) is None:
            scheduler.end = epochs if scheduler.get('by_epoch', True) else max(1, min(WARM_UP, steps // 10))
    return epochs


def add_tensorboard(cfg: Config) -> None:
    """Let the visualizer write what TensorBoard shows."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError:
        raise UserError('tensorboard=True needs a package: pip install tensorboard') from None
    cfg.visualizer.vis_backends.append(dict(type='TensorboardVisBackend'))
