"""Check before training that the files which a config names exist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from mmengine.config import Config, ConfigDict

from ..config import iter_nodes
from ..errors import UserError
from ..weights.released import how_to_fetch

# Folder name in a path -> where the data set comes from and how it lies; the first name found counts.
LAYOUTS = {
    'digits': '`make demo` makes these digits.',
    'coco': 'COCO 2017 is at https://cocodataset.org/#download, to be unpacked as '
    '(PATH is data/coco in the configs)\n'
    '  PATH/annotations/instances_train2017.json, instances_val2017.json\n'
    '  PATH/train2017/*.jpg, PATH/val2017/*.jpg',
    'imagenet': 'ImageNet-1k (ILSVRC 2012) is at https://image-net.org/download.php, to be '
    'unpacked as (PATH is data/imagenet in the configs)\n'
    '  PATH/train/n01440764/*.JPEG ..., PATH/val/n01440764/*.JPEG ... (a folder for each class)',
    'ade': 'ADE20K (SceneParsing) is at http://sceneparsing.csail.mit.edu, to be unpacked as '
    '(PATH is data/ade/ADEChallengeData2016 in the configs)\n'
    '  PATH/images/training/*.jpg, PATH/images/validation/*.jpg\n'
    '  PATH/annotations/training/*.png, PATH/annotations/validation/*.png',
}
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')  # MMPretrain downloads these itself


class Missing(NamedTuple):
    """A config entry, its value, and the path it stands for, where nothing is."""

    entry: str
    value: str
    path: str


def is_missing(path: Any) -> bool:
    """Whether this is a path on this machine, not an address, and nothing is there."""
    return isinstance(path, str) and '://' not in path and not os.path.exists(path)


def check_data(cfg: Config, *stages: str) -> None:
    """End the program unless all data that the stages ('train', 'val', 'test') read is there."""
    missing: list[Missing] = []
    for stage in stages:
        loader = cfg.get(f'{stage}_dataloader')
        if loader is not None and 'dataset' in loader:
            missing += _missing_data(loader.dataset, f'{stage}_dataloader.dataset')
            missing += _missing_truth(cfg.get(f'{stage}_evaluator'), f'{stage}_evaluator')
    if not missing:
        return
    lines = [f'{cfg.filename} reads data that is not there:']
    for entry, value, path in missing:
        lines += [f'  {entry} = {value!r}', f'      no {os.path.abspath(path)}']
    lines.append(f'Relative paths start at the folder the command runs in, {os.getcwd()}.')
    lines += dict.fromkeys(layout for _, _, path in missing for layout in _layout(path))
    lines += ['Put the data there, or say where it is (PATH):', '  --cfg-options \\']
    roots = [value for entry, value, _ in missing if entry.endswith('.data_root')]
    options = [f'    {entry}={_moved(value, roots)}' for entry, value, _ in missing]
    raise UserError('\n'.join(lines + [' \\\n'.join(options)]))


def _layout(path: str) -> list[str]:
    folders = [part.lower() for part in Path(path).parts]
    return [layout for name, layout in LAYOUTS.items() if name in folders][:1]


def _moved(value: str, roots: list[str]) -> str:
    """The value with PATH for the missing folder it lies in."""
    for root in roots:
        folder = root.rstrip('/')
        if value.rstrip('/') == folder or value.startswith(folder + '/'):
            return 'PATH' + value.rstrip('/')[len(folder) :]
    return 'PATH'


def _missing_data(dataset: ConfigDict, key: str) -> list[Missing]:
    """What a data set, or those in a wrapper, will not find; only the root if that is missing."""
    if 'datasets' in dataset:  # ConcatDataset
        parts = enumerate(dataset['datasets'])
        return [m for i, part in parts for m in _missing_data(part, f'{key}.datasets.{i}')]
    if 'dataset' in dataset:
        return _missing_data(dataset['dataset'], f'{key}.dataset')
    kind = dataset.get('type', '')
    kind = (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    fetched = kind in DOWNLOADED and dataset.get('download', True)
    if fetched or backend not in ('local', 'LocalBackend'):
        return []

    root = dataset.get('data_root') or ''
    if root and is_missing(root):
        return [Missing(f'{key}.data_root', root, root)]
    return [
        Missing(f'{key}.{entry}', value, os.path.join(root, value))
        for entry, value in _parts(dataset, kind)
        if isinstance(value, str) and value and is_missing(os.path.join(root, value))
    ]


def _parts(dataset: ConfigDict, kind: str) -> Iterator[tuple[str, Any]]:
    """Annotation files and image folders, as config entries relative to the data root."""
    files = dataset.get('ann_file')
    for file in files if isinstance(files, (list, tuple)) else [files]:
        yield 'ann_file', file
    folders = dataset.get('data_prefix')
    if isinstance(folders, dict):
        for name, folder in folders.items():
            yield f'data_prefix.{name}', folder
    elif folders:
        yield 'data_prefix', folders
    elif kind in ('ImageNet', 'ImageNet21k'):
        yield 'data_prefix', dataset.get('split')  # the folder of images is called after it


def _missing_truth(evaluator: Any, key: str) -> list[Missing]:
    """Annotation files that a metric, or one of a list, reads and does not find."""
    if isinstance(evaluator, (list, tuple)):
        parts = enumerate(evaluator)
        return [m for i, part in parts for m in _missing_truth(part, f'{key}.{i}')]
    names = ('ann_file', 'seg_prefix') if isinstance(evaluator, dict) else ()
    values = [(f'{key}.{name}', evaluator.get(name)) for name in names]
    return [Missing(entry, value, value) for entry, value in values if value and is_missing(value)]


def check_checkpoint(path: str | None, entry: str) -> None:
    """End the program if the checkpoint is a path of this machine and no file."""
    if path is not None and '://' not in path and not Path(path).expanduser().is_file():
        raise UserError(
            f'{entry} is {path}, but there is no file {os.path.abspath(os.path.expanduser(path))}'
        )


def check_pretrained(cfg: Config) -> None:
    """End the program if a part of the model starts from a file that is not there.

    A run that starts from ``load_from``, or resumes, has all weights there: it goes on without that file.
    """
    loaded = cfg.get('load_from')
    for key, node in list(iter_nodes(cfg.model, 'model')):
        inits = node.get('init_cfg') or []
        for init in [inits] if isinstance(inits, dict) else inits:
            file = os.path.expanduser(init.get('checkpoint') or '')
            if init['type'] != 'Pretrained' or not file or not is_missing(file):
                continue
            if loaded:
                node['init_cfg'] = None
                continue
            fetch = how_to_fetch(file)
            raise UserError(
                f'{key}.init_cfg starts from {init["checkpoint"]!r}, but there is no file '
                f'{os.path.abspath(file)}\n'
                f'{fetch or "Put the weights there."}\n'
                f'Or name others with --cfg-options {key}.init_cfg.checkpoint=FILE, or start from random '
                f'ones with {key}.init_cfg=None (custom configs: pretrained=FILE, pretrained=none)'
            )


def check_save_best(cfg: Config) -> None:
    """End the program if ``save_best`` names no figure of the evaluation, which would end it after an epoch.

    Only metrics whose figures are known are compared: CocoMetric, IoUMetric and Accuracy.
    """
    best = cfg.get('default_hooks', {}).get('checkpoint', {}).get('save_best')
    evaluator = cfg.get('val_evaluator')
    if not best or cfg.get('val_cfg') is None or not isinstance(evaluator, dict):
        return
    kind = str(evaluator.get('type')).split('.')[-1]
    if kind == 'CocoMetric':
        kinds = evaluator.get('metric', 'bbox')
        ends = evaluator.get('metric_items') or ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        figures = [f'{k}_{end}' for k in ([kinds] if isinstance(kinds, str) else kinds) for end in ends]
        prefix = evaluator.get('prefix') or 'coco'
    elif kind == 'IoUMetric' and list(evaluator.get('iou_metrics', ['mIoU'])) == ['mIoU']:
        figures, prefix = ['aAcc', 'mIoU', 'mAcc'], evaluator.get('prefix') or ''
    elif kind == 'Accuracy':
        topk = evaluator.get('topk', 1)
        figures = [f'top{k}' for k in ([topk] if isinstance(topk, int) else topk)]
        prefix = evaluator.get('prefix') or 'accuracy'
    else:
        return
    known = [f'{prefix}/{figure}' if prefix else figure for figure in figures]
    if 'classwise' in evaluator or 'proposal' in str(evaluator.get('metric')):  # these add more
        return
    for name in [best] if isinstance(best, str) else best:
        if name not in ('auto', *known):
            raise UserError(
                f'default_hooks.checkpoint.save_best is {name!r}, but the evaluation gives {", ".join(known)}'
            )
