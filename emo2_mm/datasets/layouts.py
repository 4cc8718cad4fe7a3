"""Find, read and validate a custom dataset in a folder, and write it into a config.

What PATH holds, by the config's ``data_format``; of several names, the first that is there counts, and
``training``, ``valid`` or ``validation`` will do for ``train`` or ``val``:

- ``coco``, for detection: ``annotations/{train,val}.json``, ``annotations/instances_{train,val}.json`` (or
  with ``2017``) or ``{train,val}/_annotations.coco.json``; images in ``{train,val}``,
  ``images/{train,val}``, ``images`` or PATH itself. Classes are the categories of the training file.
- ``maps``, for segmentation: ``images/{train,val}`` and, with the same names, PNG files of class numbers in
  ``annotations/{train,val}``, ``labels/{train,val}`` or ``masks/{train,val}``; ``classes.txt``, a class a
  line, the one of number 0 first. 255 is no class.
- ``folders``, for classification: ``{train,val}/CLASS/*.jpg``; the folders are the classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Sequence

from mmengine.config import Config, ConfigDict

from ..config import innermost_dataset, iter_nodes
from ..errors import UserError

SPLITS = {'train': ('train', 'training', 'train2017'), 'val': ('val', 'valid', 'validation', 'val2017')}
IMAGE_KINDS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def _fit_coco(cfg: Config, root: Path) -> tuple[int, list[str]]:
    files = {split: _coco_file(root, split) for split in SPLITS}
    contents = {split: _read_coco(file) for split, file in files.items()}
    names = {split: [x['name'] for x in content['categories']] for split, content in contents.items()}
    classes = names['train']
    if names['val'] != classes or len(set(classes)) < len(classes):  # a label is the place in this list
        raise UserError(
            f'{files["train"]} and {files["val"]} have to list the same categories in the same order, each '
            f'once; they have {", ".join(classes)} and {", ".join(names["val"])}'
        )
    for split, stages in (('train', ['train']), ('val', ['val', 'test'])):
        folder = _coco_images(root, split, files[split], contents[split])
        for stage in stages:
            loader = cfg[f'{stage}_dataloader']
            loader.dataset = innermost_dataset(loader.dataset)  # without its RepeatDataset
            loader.dataset.update(
                data_root=f'{root}/',
                ann_file=files[split].relative_to(root).as_posix(),
                data_prefix=dict(img=folder),
                metainfo=dict(classes=tuple(classes)),
            )
            if stage != 'train':
                cfg[f'{stage}_evaluator'].ann_file = str(files[split])
    seen = {box['image_id'] for box in contents['train']['annotations']}  # the others are left out
    return len(seen), classes


def _coco_file(root: Path, split: str) -> Path:
    names = [f'annotations/{prefix}{name}.json' for name in SPLITS[split] for prefix in ('', 'instances_')]
    return _first(root, [*names, *(f'{name}/_annotations.coco.json' for name in SPLITS[split])], Path.is_file)


def _read_coco(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{file} is not JSON: {error}') from None
    for key, what, entry in (
        ('images', 'images', 'file_name'),
        ('categories', 'classes', 'name'),
        ('annotations', 'boxes', 'image_id'),
    ):
        if not isinstance(content, dict) or not content.get(key):
            raise UserError(f'{file} has no {what}: its list {key!r} is missing or empty')
        if not all(entry in part for part in content[key]):
            raise UserError(f'{file}: an entry of {key!r} has no {entry!r}')
    return content


def _coco_images(root: Path, split: str, file: Path, content: dict[str, Any]) -> str:
    """Find the folder of the images; all of them have to be there."""
    names = [image['file_name'] for image in content['images']]
    folders = [f'{prefix}{name}/' for name in SPLITS[split] for prefix in ('', 'images/')] + ['images/', '']
    folder = next((folder for folder in folders if (root / folder / names[0]).is_file()), None)
    if folder is None:
        raise UserError(
            f'{file} names {names[0]}, which is in none of {", ".join(f"{root / x}" for x in folders)}'
        )
    lost = [name for name in names if not (root / folder / name).is_file()]
    if lost:
        raise UserError(f'{root / folder} lacks {len(lost)} images that {file} names, such as {lost[0]}')
    return folder


def _fit_maps(cfg: Config, root: Path) -> tuple[int, list[str]]:
    names = root / 'classes.txt'
    classes = names.read_text(encoding='utf-8').split('\n') if names.is_file() else []
    classes = [name.strip() for name in classes if name.strip()]
    if len(classes) < 2:
        raise UserError(
            f'{names} has to name two classes or more, one a line, the one with the number 0 in the maps '
            "first (what is no object is one, such as 'background')"
        )
    count = 0
    for split, stages in (('train', ['train']), ('val', ['val', 'test'])):
        images = _first(root, [f'images/{name}' for name in SPLITS[split]], Path.is_dir)
        tops = ('annotations', 'labels', 'masks')
        maps = _first(root, [f'{top}/{name}' for top in tops for name in SPLITS[split]], Path.is_dir)
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_KINDS)
        suffixes = sorted({path.suffix for path in files})
        if len(suffixes) != 1:
            found = f'several kinds, {", ".join(suffixes)}' if suffixes else 'none'
            raise UserError(
                f'{images} has to hold images of one kind ({", ".join(IMAGE_KINDS)}); found {found}'
            )
        lost = [path.stem for path in files if not (maps / f'{path.stem}.png').is_file()]
        if lost:
            raise UserError(f'{maps} lacks {len(lost)} maps of images in {images}, such as {lost[0]}.png')
        for stage in stages:
            dataset = cfg[f'{stage}_dataloader'].dataset
            dataset.update(
                type='BaseSegDataset',
                data_root=str(root),
                data_prefix=dict(
                    img_path=images.relative_to(root).as_posix(),
                    seg_map_path=maps.relative_to(root).as_posix(),
                ),
                img_suffix=suffixes[0],
                metainfo=dict(classes=tuple(classes)),
            )
        count = count or len(files)
    stages = [cfg[f'{stage}_dataloader'].dataset.pipeline for stage in ('train', 'val', 'test')]
    for _, part in iter_nodes([*stages, cfg.tta_pipeline], 'pipeline'):
        if 'reduce_zero_label' in part:  # number 0 is a class
            part.reduce_zero_label = False
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)  # epochs, not steps
    cfg.default_hooks.logger.log_metric_by_epoch = True
    cfg.log_processor.by_epoch = True
    cfg.default_hooks.checkpoint.update(by_epoch=True, interval=1)
    return count, classes


def _fit_folders(cfg: Config, root: Path) -> tuple[int, list[str]]:
    folders = {split: _first(root, names, Path.is_dir) for split, names in SPLITS.items()}
    names = {
        split: sorted(path.name for path in folder.iterdir() if path.is_dir())
        for split, folder in folders.items()
    }
    classes = names['train']
    if len(classes) < 2:
        raise UserError(f'{folders["train"]} has to hold a folder for each of two classes or more')
    odd = sorted(set(classes) ^ set(names['val']))
    if odd:  # a label is the place of its folder
        raise UserError(
            f'{folders["train"]} and {folders["val"]} have other classes: {", ".join(odd)} is in one only'
        )
    counts = {}
    for split, stages in (('train', ['train']), ('val', ['val', 'test'])):
        for name in classes:
            files = (folders[split] / name).rglob('*')
            counts[split, name] = sum(path.suffix.lower() in IMAGE_KINDS for path in files)
            if not counts[split, name]:
                raise UserError(f'{folders[split] / name} holds no image ({", ".join(IMAGE_KINDS)})')
        for stage in stages:
            pipeline = cfg[f'{stage}_dataloader'].dataset.pipeline
            cfg[f'{stage}_dataloader'].dataset = ConfigDict(
                type='CustomDataset',
                data_root=str(root),
                data_prefix=folders[split].name,
                metainfo=dict(classes=tuple(classes)),
                pipeline=pipeline,
            )
    if len(classes) < 5:
        for part in (cfg.model.head, cfg.val_evaluator, cfg.test_evaluator):
            part.topk = (1,)
    count = sum(number for (split, _), number in counts.items() if split == 'train')
    return count, classes


FORMATS: dict[str, Callable[[Config, Path], tuple[int, list[str]]]] = {
    'coco': _fit_coco,
    'maps': _fit_maps,
    'folders': _fit_folders,
}


def _first(root: Path, names: Sequence[str], there: Callable[[Path], bool]) -> Path:
    found = next((root / name for name in names if there(root / name)), None)
    if found is None:
        raise UserError(f'{root} has none of {", ".join(names)}; see docs/own_data.md for the layout')
    return found
