"""Custom datasets: complete a config ``configs/*/*_custom.py`` from a folder of data and from its options.

    python tools/train.py configs/det/retinanet_emo2_custom.py --cfg-options data_root=PATH arch=2m

What PATH holds is described in :mod:`emo2_mm.datasets.layouts`, the options in
:mod:`emo2_mm.datasets.options`.
"""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from ..config import iter_nodes
from ..errors import UserError, note
from . import layouts, options
from .convert import split_dataset

# What the parts were built from
LEFTOVERS = ('dataset', 'crop', 'checkpoint', 'norm_cfg', 'train_pipeline', 'test_pipeline', 'vis_backends')


def apply_custom_dataset(cfg: Config) -> None:
    """Give a custom config its classes, data sets, options and schedule; leave any other config as it is.

    What comes out is a plain config: the one that training saves in its work dir needs no ``data_root``.

    Args:
        cfg: Config as :func:`~emo2_mm.config.load_config` returns it; it is changed.

    Raises:
        UserError: If the data or an option cannot be used; the message names file and remedy.
    """
    if 'data_format' not in cfg:
        return
    if not cfg.data_root:
        raise UserError(
            f'{cfg.filename} is for own data; say where it is: --cfg-options data_root=PATH\n'
            f'{layouts.__doc__}'
        )
    given: dict[str, Any] = cfg.pop('cfg_options', {})
    file = Config.fromfile(cfg.filename, import_custom_modules=False)
    opts = options.take_options(cfg, given, file)
    chosen = _apply_to_model(cfg, opts, file, given)
    if opts.tensorboard:
        options.add_tensorboard(cfg)

    root = opts.data_root
    if opts.val_fraction is not None:
        root = split_dataset(root, opts.data_format, opts.val_fraction, cfg.work_dir)
    images, classes = layouts.FORMATS[opts.data_format](cfg, root)
    for _, part in iter_nodes([cfg.model, cfg.get('data_preprocessor') or {}], 'model'):
        if 'num_classes' in part:
            part.num_classes = len(classes)

    batch = options.set_batch(cfg, opts.batch_size or options.usual_batch(cfg, file), images)
    lr = options.set_lr(cfg, opts.lr)
    epochs = options.set_schedule(cfg, opts.max_epochs, images)
    workers = options.set_workers(cfg)
    for name in LEFTOVERS:
        cfg.pop(name, None)
    # Settings by MMEngine's names have the last word; the batch size was bounded above
    last = {
        key: value
        for key, value in given.items()
        if key not in (*options.Options._fields, *options.SAME.values())
    }
    cfg.merge_from_dict({key: value for key, value in last.items() if key not in LEFTOVERS})
    note(f'{root}: {images} images to train on; {len(classes)} classes: {", ".join(classes)}')
    note(f'{epochs} epochs, batches of {batch}, learning rate {lr}, num_workers {workers}; {chosen}')


def _apply_to_model(cfg: Config, opts: options.Options, file: Config, given: dict[str, Any]) -> str:
    """Apply what the network and its input depend on; return it in words."""
    model, backbone = cfg.model, cfg.model.backbone
    words = []
    if isinstance(opts.arch, str):
        options.set_arch(model, file.model.backbone.arch, opts.arch)
        words.append(f'arch {opts.arch}')
    start = options.set_pretrained(backbone, opts.arch, opts.pretrained, bool(cfg.get('load_from')))
    words.append(f'from {start}')
    if 'light_head' in file:
        light = opts.light_head
        if light is None:
            light = options.head_of_checkpoint_is_light(cfg.get('load_from'))
        if light is None:
            light = opts.arch in ('1m', '2m') and model.neck.out_channels == 256
        if light:
            options.set_light_head(model)
            words.append('a light head (light_head=False is the published one)')
    size, own = opts.image_size, options.own_size(cfg, given)
    if size is None and not own and get_device() == 'cpu' and model.type in options.CPU_SIZES:
        side = options.CPU_SIZES[model.type]
        size = (side, side)
        words.append(f'no GPU, hence images of {side} pixels (image_size=N)')
    elif size:
        words.append('images of {} x {} pixels (height x width)'.format(*size))
    if size:
        options.set_image_size(cfg, size)
    return ', '.join(words)
