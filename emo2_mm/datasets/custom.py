"""Custom datasets: complete a config ``configs/*/*_custom.py`` from the data in a folder.

    python tools/train.py configs/det/retinanet_emo2_1m_custom.py --cfg-options data_root=PATH

What PATH holds is described in :mod:`emo2_mm.datasets.layouts`.
"""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config, ConfigDict

from ..config import iter_nodes
from ..errors import UserError, note
from . import layouts

BEST = {'coco': 'coco/bbox_mAP', 'maps': 'mIoU', 'folders': 'accuracy/top1'}
IMAGES_SEEN = 15000  # of the short schedule, within these bounds
EPOCHS = (12, 100)


def apply_custom_dataset(cfg: Config) -> None:
    """Give a config for own data its classes, data sets and schedule; leave any other config as it is.

    What comes out is a plain config: the one that training saves in its work dir needs no ``data_root``.
    Ends the program, naming file and remedy, if the data is not as the module says.
    """
    if 'data_format' not in cfg:
        return
    form, root, epochs = cfg.pop('data_format'), cfg.pop('data_root'), cfg.pop('max_epochs')
    if not root:
        raise UserError(
            f'{cfg.filename} is for own data; say where it is: --cfg-options data_root=PATH\n'
            f'{layouts.__doc__}'
        )
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f'data_root is {root}, but there is no folder {root.absolute()}')
    images, classes = layouts.FORMATS[form](cfg, root)
    _set_batch(cfg, images)
    for _, part in iter_nodes([cfg.model, cfg.get('data_preprocessor') or {}], 'model'):
        if 'num_classes' in part:
            part.num_classes = len(classes)
    if epochs is None:
        epochs = min(max(round(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])
    _set_schedule(cfg, epochs)
    cfg.default_hooks.checkpoint.save_best = BEST[form]
    _train_all_without_weights(cfg.model.backbone)
    for name in ('dataset', 'crop', 'checkpoint', 'train_pipeline', 'test_pipeline'):
        cfg.pop(name, None)  # what the parts were built from
    note(
        f'{root}: {images} images to train on, {epochs} epochs; {len(classes)} classes: {", ".join(classes)}'
    )


def _set_batch(cfg: Config, images: int) -> None:
    """Leave the last, smaller batch of an epoch out: a batch norm cannot learn from one value a channel."""
    loader = cfg.train_dataloader
    loader.batch_size = min(loader.batch_size, images)
    if not loader.get('batch_sampler'):
        loader.drop_last = True


def _set_schedule(cfg: Config, epochs: int) -> None:
    cfg.train_cfg = ConfigDict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    decay = dict(eta_min=0.0, begin=0, end=epochs, by_epoch=True, convert_to_iter_based=True)
    cfg.param_scheduler = [
        ConfigDict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        ConfigDict(type='CosineAnnealingLR', **decay),
    ]


def _train_all_without_weights(backbone: ConfigDict) -> None:
    """Do not freeze randomly initialized stages."""
    if not backbone.get('init_cfg') and 'frozen_stages' in backbone:
        backbone.update(frozen_stages=-1, norm_eval=False)
        note('The backbone starts from random weights: none of its stages is frozen.')
