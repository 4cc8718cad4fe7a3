"""Check the datasets that a config names, before training: annotations, images, masks, maps, labels.

    python tools/check_dataset.py configs/det/mask-rcnn_emo2_5m.py --split train

Takes detection in COCO's format, folders of images and maps, and folders of classes, which may be wrapped.
What can be found is listed in :data:`emo2_mm.datasets.report.KINDS`, with what training does with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Callable, Iterator, Sequence

import cv2
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope

from ...engine.preflight import check_data
from ..context import use_own_datasets
from ..custom import apply_custom_dataset
from ..report import Report

# class -> module and function that checks it
CHECKS = {
    'CocoDataset': ('coco', 'check_coco'),
    'BaseSegDataset': ('segmentation', 'check_segmentation'),
    'CustomDataset': ('classification', 'check_classification'),
}
Check = Callable[[Any, ConfigDict, ConfigDict, Report], str]


def leaves(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    if 'datasets' in dataset:
        for part in dataset.datasets:
            yield from leaves(part)
    elif 'dataset' in dataset:
        yield from leaves(dataset.dataset)
    else:
        yield dataset


def build(leaf: ConfigDict, scope: str) -> tuple[Any, Check]:
    """The dataset as training builds it, but for reading files, and the function that checks it.

    Raises:
        ValueError: If it is none of :data:`CHECKS`, or is not in local files.
    """
    if '://' in (leaf.get('data_root') or ''):
        raise ValueError(f'{leaf.data_root} is no local folder, which is all that can be checked')
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build({**leaf, 'lazy_init': True, 'pipeline': []})
    names = [kind.__name__ for kind in type(dataset).__mro__]
    for name, (module, check) in CHECKS.items():
        if name in names:  # each needs its own library
            return dataset, getattr(import_module(f'.{module}', __name__), check)
    raise ValueError(f'{names[0]} cannot be checked, only {", ".join(CHECKS)} and what derives from them')


def check_datasets(cfg: Config, splits: Sequence[str], max_shown: int = 10) -> int:
    """Check the datasets of a config and print what was found, errors first.

    Args:
        cfg: Config of MMPretrain, MMDetection or MMSegmentation; it is changed.
        splits: Any of 'train', 'val', 'test'.
        max_shown: Findings of one kind that are printed.

    Returns:
        The number of errors.

    Raises:
        UserError: If a folder or an annotation file does not exist.
        ValueError: If a dataset is of a kind that cannot be checked.
    """
    if not {'val', 'test'} & set(splits):
        cfg.val_cfg = None  # a custom config does without a validation split then
    apply_custom_dataset(cfg)
    use_own_datasets(cfg)
    loaders = [cfg.get(f'{split}_dataloader') for split in splits]
    parts = [leaf for loader in loaders if loader for leaf in leaves(loader.dataset)]
    parts = [leaf for i, leaf in enumerate(parts) if leaf not in parts[:i]]  # test is often val
    if not parts:
        raise ValueError(f'it has no dataset to {" or ".join(splits)} with')
    check_data(cfg, *splits)
    datasets = [build(leaf, cfg.get('default_scope', 'mmengine')) for leaf in parts]

    cv2.setLogLevel(0)  # its messages name no files and break the progress bar
    report = Report()
    for leaf, (dataset, check) in zip(parts, datasets):
        print(check(dataset, leaf, cfg.get('model') or {}, report), flush=True)
    return report.show(max_shown)
