"""Shrink a real config until it trains on the demo's digits within minutes, on a CPU.

This is all that :func:`shrink` changes:

- data: the digits of make_digits.py and their number of classes; images of ``side`` pixels and no
  augmentation except the classifier's crop; small batches, one worker;
- initialization: a checkpoint of the demo instead of ImageNet weights, hence no frozen stages; distillation
  has the demo's classifier as its teacher and starts from scratch, with a layer scale of 0.1;
- model: windows that fit the small images; an FPN and its heads are half as wide; Mask R-CNN samples 64
  regions of an image and tests 100, not 512 and 1000;
- schedule: ``steps`` steps at the learning rate ``lr``; a tenth of them is warm-up, the decay begins at its
  share of the training; a faster moving average; an evaluation midway and one at the end; a seed.

Everything else is the config's: types and settings of neck, heads, losses, anchors, assigners, optimizer,
gradient clipping, weight decay, dataset wrappers, loops, metrics, hooks.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config, ConfigDict

from emo2_mm.config import innermost_dataset, iter_nodes

CLASSIFIER = 'configs/demo/emo2_1m_digits.py'
DIGITS = tuple('0123456789')
# a mirrored digit is none, and there is no time to learn from the others
AUGMENTATIONS = ('RandomFlip', 'Expand', 'MinIoURandomCrop', 'PhotoMetricDistortion', 'RandAugment')


class Method(NamedTuple):
    """A method, its real config, and how it learns here."""

    title: str
    config: str
    side: int  # pixels, of square images
    batch: int
    steps: int
    lr: float
    minutes: float  # on two cores, with its evaluations
    start: str = 'retinanet'  # the method, or else the classifier, whose backbone it starts from
    epochs: int = 2  # that the steps are divided into, where the config counts epochs


# The one-minute classifier knows single digits of one size. The detector that starts from it passes on what
# it has learned about scenes, SegFormer what it has learned about maps to those that see only stride 32.
METHODS = {
    'retinanet': Method(
        'RetinaNet', 'configs/det/retinanet_emo2_1m.py', 192, 8, 500, 2e-3, 5, start='classify'
    ),
    'ssdlite': Method('SSDLite', 'configs/det/ssdlite_emo2_1m_320.py', 320, 8, 250, 2.4e-3, 4),
    'mask-rcnn': Method('Mask R-CNN', 'configs/det/mask-rcnn_emo2_1m.py', 192, 4, 400, 3e-4, 7),
    'segformer': Method('SegFormer', 'configs/seg/segformer_emo2_1m.py', 192, 8, 300, 4e-4, 3),
    'fpn': Method('Semantic FPN', 'configs/seg/fpn_emo2_1m.py', 192, 8, 300, 4e-4, 3),
    'deeplabv3': Method(
        'DeepLabv3', 'configs/seg/deeplabv3_emo2_1m.py', 320, 6, 300, 8e-4, 6, start='segformer'
    ),
    'pspnet': Method('PSPNet', 'configs/seg/pspnet_emo2_1m.py', 320, 6, 300, 8e-4, 6, start='segformer'),
    'kd': Method(
        'Distilled classifier', 'configs/cls/emo2_1m_kd.py', 48, 64, 360, 3e-3, 3, start='classify', epochs=4
    ),
}


def shrink(method: Method, data: Path, pretrained: str) -> Config:
    """A method's config for the digits in ``data``, starting from a checkpoint (or having it as teacher)."""
    cfg = Config.fromfile(method.config)
    _shrink_model(cfg, method, pretrained)
    for stage in ('train', 'val', 'test'):
        _shrink_loader(cfg, stage, method, data)
    _shrink_schedule(cfg, method)
    cfg.default_hooks.logger.interval = 10
    cfg.randomness = dict(seed=0)
    # what these defined is in the model and the loaders
    for name in ('checkpoint', 'dataset', 'crop', *(f'{p}_pipeline' for p in ('train', 'test', 'tta'))):
        cfg.pop(name, None)
    return cfg


def _shrink_model(cfg: Config, method: Method, pretrained: str) -> None:
    model = cfg.model
    for _, node in iter_nodes([model, cfg.get('data_preprocessor', {})], 'model'):
        if 'num_classes' in node:  # maps have a background
            node.num_classes = len(DIGITS) + (cfg.default_scope == 'mmseg')
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (method.side, method.side)
    if model.get('neck', {}).get('type') == 'FPN':
        for _, node in iter_nodes(model, 'model'):
            for key, value in node.items():
                if value == 256 and key.endswith('channels'):
                    node[key] = 128
                elif value == [256] * 4:
                    node[key] = [128] * 4
    if 'teacher' in model:
        teacher = Config.fromfile(CLASSIFIER)
        model.teacher = dict(
            **teacher.model, data_preprocessor=teacher.data_preprocessor, pretrained=pretrained
        )
        model.teacher_size = method.side
    if 'rcnn' in model.get('train_cfg', {}):
        model.train_cfg.rcnn.sampler.num = 64
        model.test_cfg.rpn.max_per_img = 100

    backbone = model.backbone
    backbone.window_size = max(3, method.side // 32)  # whole windows at strides 16 and 32
    if 'init_cfg' in backbone:
        backbone.init_cfg.checkpoint = pretrained
    else:
        backbone.layer_scale_init_value = 0.1
    if 'frozen_stages' in backbone:
        backbone.update(frozen_stages=-1, norm_eval=False)


def _shrink_loader(cfg: Config, stage: str, method: Method, data: Path) -> None:
    split = 'train' if stage == 'train' else 'val'
    loader = cfg[f'{stage}_dataloader']
    loader.update(batch_size=method.batch, num_workers=1)
    dataset = loader.dataset
    if 'dataset' in dataset:  # RepeatDataset
        dataset.times = 1
        dataset = innermost_dataset(dataset)
    coco = data / 'coco'
    if cfg.default_scope == 'mmdet':
        annotations = f'annotations/{split}.json'
        dataset.update(data_root=f'{coco}/', ann_file=annotations, metainfo=dict(classes=DIGITS))
        dataset.data_prefix.img = f'{split}/'
        if stage == 'train':
            dataset.filter_cfg.min_size = 0
        else:
            cfg[f'{stage}_evaluator'].ann_file = str(coco / annotations)
    elif cfg.default_scope == 'mmseg':
        dataset.update(
            type='BaseSegDataset',
            data_root=str(coco),
            data_prefix=dict(img_path=split, seg_map_path=f'maps/{split}'),
            metainfo=dict(classes=('background', *DIGITS)),
        )
    else:
        del dataset['split']
        dataset.update(type='CustomDataset', data_root=str(data / 'folders'), data_prefix=split)
    if stage == 'train' and 'max_epochs' in cfg.train_cfg:
        dataset.indices = method.steps // method.epochs * method.batch
    dataset.pipeline = [
        _shrink_transform(t, method.side) for t in dataset.pipeline if t.type not in AUGMENTATIONS
    ]


def _shrink_transform(transform: ConfigDict, side: int) -> ConfigDict:
    for _, node in iter_nodes(transform, 'transform'):
        for key in ('scale', 'crop_size'):
            if key in node:
                node[key] = (side, side) if isinstance(node[key], tuple) else side
        if node.get('type') == 'RandomResize':
            node.ratio_range = (1.0, 1.0)
        if node.get('type') == 'RandomResizedCrop':
            node.crop_ratio_range = (0.7, 1.0)  # less than that of a digit may be another
        if 'reduce_zero_label' in node:  # the maps have a background
            node.reduce_zero_label = False
    return transform


def _shrink_schedule(cfg: Config, method: Method) -> None:
    loop = cfg.train_cfg
    if 'max_epochs' in loop:
        whole = loop.max_epochs
        loop.update(max_epochs=method.epochs, val_interval=method.epochs // 2)
    else:
        whole = loop.max_iters
        loop.update(max_iters=method.steps, val_interval=method.steps // 2)
        cfg.default_hooks.checkpoint.interval = method.steps // 4
    warm_up = method.steps // 10
    for scheduler in cfg.param_scheduler:  # both count steps
        if scheduler.type == 'LinearLR':
            scheduler.end = warm_up
        else:
            scheduler.update(
                begin=max(warm_up, round(scheduler.begin / whole * method.steps)), end=method.steps
            )
        scheduler.by_epoch = False
        for name in ('T_max', 'convert_to_iter_based'):
            scheduler.pop(name, None)
    cfg.optim_wrapper.optimizer.lr = method.lr
    for hook in cfg.get('custom_hooks', []):
        if hook.type == 'EMAHook':
            hook.momentum = 0.05
