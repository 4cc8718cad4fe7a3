"""Find a custom dataset in a folder, check it, and write it into a config.

What PATH (``data_root``) holds, by the config's ``data_format``. TRAIN stands for ``train``, ``training`` or
``train2017``, VAL for ``val``, ``valid``, ``validation``, ``val2017`` or, if there is none of these, ``test``
or ``testing``; upper and lower case count as the same, hidden files and folders do not count.

- ``coco``, for detection: an annotation file for each split, ``annotations/TRAIN.json``,
  ``annotations/instances_TRAIN.json``, ``TRAIN/_annotations.coco.json`` (Roboflow), ``TRAIN.json``, or the
  only JSON file in ``TRAIN`` or ``TRAIN/annotations`` (CVAT); images in ``TRAIN``, ``images/TRAIN``,
  ``TRAIN/images``, ``images``, or next to the file. Classes are the categories of the training file.
- ``maps``, for segmentation: ``images/TRAIN`` and, with the same names, maps of class numbers in
  ``annotations/TRAIN``, ``labels/TRAIN`` or ``masks/TRAIN``, or ``TRAIN/images`` and ``TRAIN/masks``;
  ``classes.txt``, a class a line, the one of number 0 first. 255 is no class.
- ``folders``, for classification: ``TRAIN/CLASS/*.jpg``; the folders are the classes.
"""

from __future__ import annotations

import difflib
import filecmp
import functools
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

from mmengine.config import Config, ConfigDict

from ..config import innermost_dataset, iter_nodes
from ..errors import UserError, note, printable
from .coco_file import match_names, read_coco
from .convert import FORMATS as FOREIGN
from .convert import recognise
from .files import decode, describe, in_words, is_hidden, list_files, subfolders
from .report import Report, repeated

SPLITS = {
    'train': ('train', 'training', 'train2017'),
    'val': ('val', 'valid', 'validation', 'val2017', 'test', 'testing'),
}
STAGES = {'train': ('train',), 'val': ('val', 'test')}
IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'img_dir', 'jpegimages', 'data')
MAP_FOLDERS = ('annotations', 'labels', 'masks', 'ann_dir', 'label', 'mask', 'gt', 'segmentationclass')
MAP_SUFFIXES = ('.png', '_mask.png', '_label.png', '_labels.png', '_gt.png', '-mask.png', '.bmp', '.tif')
NAME_FILES = ('classes.txt', 'labels.txt', 'class_names.txt')
NO_BOXES = ('captions', 'keypoints', 'panoptic', 'info', 'stuff')  # other files of COCO


Fit = Callable[[Config, Path], 'tuple[int, list[str]]']


def _reported(fit: Callable[[Config, Path, Report], tuple[int, list[str]]]) -> Fit:
    """Complete a function that writes the datasets of a folder into a config: checks, findings."""

    @functools.wraps(fit)
    def run(cfg: Config, root: Path) -> tuple[int, list[str]]:
        if not root.is_dir():
            raise UserError(_no_folder(root))
        for stage in ('train', 'val', 'test'):
            loader = cfg.get(f'{stage}_dataloader')
            if loader is not None and 'datasets' in innermost_dataset(loader.dataset):
                raise UserError(
                    f'{stage}_dataloader.dataset is a {loader.dataset.type} of several datasets; with one '
                    'data_root, only wrappers of one dataset can be used, such as ClassBalancedDataset'
                )
        report = Report()
        try:
            count, classes = fit(cfg, root, report)
        except UserError as error:
            hint = _foreign(root, fit.__name__)
            if not hint:
                raise
            raise type(error)(f'{error}{hint}') from None
        odd = [name for name in [str(root), *classes] if name != printable(name)]
        if odd:  # the config could not be saved
            raise UserError(f'the name {printable(odd[0])} in {printable(str(root))} is not UTF-8: rename it')
        report.tell()
        return count, classes

    return run


def _foreign(root: Path, fit: str) -> str:
    """A line about the format of a folder that a config cannot read, and the command that converts it."""
    kind = recognise(root)
    native = {'_fit_coco': ('coco', 'masks', 'folders'), '_fit_maps': ('folders',)}
    if kind is None or kind in native.get(fit, FOREIGN):
        return ''
    to = ' --to maps' if fit == '_fit_maps' and kind != 'masks' else ''
    return (
        f'\n{root} looks like {FOREIGN[kind]}; this writes it in the layout that is read here:\n'
        f'  python tools/convert_dataset.py {shlex.quote(str(root))} NEW_FOLDER{to}'
    )


def _no_folder(root: Path) -> str:
    message = f'data_root is {root}, but there is no folder {root.absolute()}'
    parent = root.absolute().parent
    if '\\' in str(root) and Path(str(root).replace('\\', '/')).is_dir():
        return f'{message}; write the path with / for \\'
    return f'{message}; {describe(parent)}' if parent.is_dir() else message


class NotFound(UserError):
    """A split that is not in the folder."""


def _splits(cfg: Config, root: Path, find: Callable[[Path, str], Any]) -> Iterator[tuple[str, Any]]:
    """Yield the splits, and what ``find`` finds of each.

    Without ``val_cfg``, a folder without a validation split will do: then ``test_cfg`` becomes None, too.
    """
    for split in SPLITS:
        try:
            found = find(root, split)
        except NotFound:
            if split == 'train' or cfg.get('val_cfg') is not None:
                raise
            cfg.test_cfg = None
            return
        yield split, found


def _datasets(cfg: Config, split: str) -> list[ConfigDict]:
    """The dataset configs that a split stands for: that of val is tested on, too."""
    return [innermost_dataset(cfg[f'{stage}_dataloader'].dataset) for stage in STAGES[split]]


def _children(folder: Path, folders: bool = True) -> dict[str, Path]:
    """Folders, or files, in a folder by their names in lower case."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {e.name.lower(): folder / e.name for e in entries if e.is_dir() == folders}


def _find(folder: Path, names: Iterable[str], folders: bool = True) -> Path | None:
    """The first of these names that a folder holds, in any case."""
    there = _children(folder, folders)
    return next((there[name] for name in names if name in there), None)


def _refuse(root: Path, split: str, wanted: str) -> NotFound:
    """What is looked for and what is there; a layout one folder below is named."""
    tops = [name for name in subfolders(root) if name.lower() not in (*IMAGE_FOLDERS, *MAP_FOLDERS)]
    below = [name for name in tops if set(subfolders(root / name)) & set(SPLITS['train'])]
    hint = f'\nPerhaps data_root={root / below[0]}' if len(below) == 1 else ''
    if split == 'val':
        hint = '\nval_fraction=0.2 splits some images off; --no-validate trains without a validation split'
    return NotFound(f'{root} has no {wanted}; {describe(root)}{hint}')


# ---------------------------------------------------------------- COCO


@_reported
def _fit_coco(cfg: Config, root: Path, report: Report) -> tuple[int, list[str]]:
    classes: list[str] | None = None
    seen: set[Any] = set()
    images = {}
    alone = cfg.get('val_cfg') is None
    masks = any(part.get('with_mask') for _, part in iter_nodes(cfg.train_dataloader.dataset, 'train'))
    for split, file in _splits(cfg, root, lambda root, split: _coco_file(root, split, alone)):
        own = Report()
        content = read_coco(file, own, classes=classes)
        if not own.of('error') and not (content['images'] and content['annotations']):
            empty = 'images' if not content['images'] else 'annotations'
            raise UserError(f'{file}: its list {empty!r} is empty')
        own.raise_errors()
        folder = _coco_images(root, split, file, content)
        own = Report()
        content = read_coco(file, own, classes, root / folder, verify=True, masks=masks)
        own.raise_errors()
        for code, places in own.found.items():
            report.add(code, *places)
        if classes is None:
            classes = [category['name'] for category in content['categories']]
            seen = {box['image_id'] for box in content['annotations']}  # the others are dropped
        else:
            _check_unknown(file, content, classes)
        images[split] = [root / folder / image['file_name'] for image in content['images']]
        for dataset in _datasets(cfg, split):
            dataset.update(
                type='emo2_mm.datasets.coco.CocoDataset',
                data_root=f'{root}/',
                ann_file=file.relative_to(root).as_posix(),
                data_prefix=dict(img=folder),
                metainfo=dict(classes=tuple(classes)),
                verify_images=True,
            )
        if split == 'val':
            for stage in STAGES['val']:
                cfg[f'{stage}_evaluator'].update(type='emo2_mm.datasets.coco.CocoMetric', ann_file=str(file))
    _tell_shared(images)
    return len(seen), classes or []


def _check_unknown(file: Path, content: dict[str, Any], classes: Sequence[str]) -> None:
    """Refuse objects of classes that are not trained."""
    used = {annotation['category_id'] for annotation in content['annotations']}
    names = [c['name'] for c in content['categories'] if c['id'] in used and c['name'] not in classes]
    if names:
        near = difflib.get_close_matches(names[0].lower(), [name.lower() for name in classes], 1)
        hint = f' (it has {near[0]!r})' if near else ''
        raise UserError(
            f'{file} has objects of {", ".join(map(repr, names))}, which is no category of the training '
            f'file{hint}: rename the category, or delete these objects'
        )


def _tokens(name: str) -> set[str]:
    """Words and numbers in a name: instances_train2017 -> instances, train2017, train."""
    words = re.findall(r'[a-z]+\d*', name.lower())
    return {*words, *(word.rstrip('0123456789') for word in words)}


def _json_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    files = [path for path in folder.iterdir() if path.suffix.lower() == '.json' and path.is_file()]
    return sorted(path for path in files if not (is_hidden(path.name) or _tokens(path.stem) & set(NO_BOXES)))


def _coco_file(root: Path, split: str, alone: bool) -> Path:
    """Find the annotation file of a split; with ``alone``, the only one there is may be for training."""
    tops = [_find(root, ['annotations']), root, _find(root, ['labels'])]
    loose = [path for top in tops for path in _json_files(top)]
    for name in SPLITS[split]:
        named = [path for path in loose if name in _tokens(path.stem)]
        exact = [path for path in named if path.stem.lower() in (name, f'instances_{name}')]
        folder = _find(root, [name])
        inside = _json_files(folder) if folder else []
        inside = inside or (_json_files(_find(folder, ['annotations'])) if folder else [])
        roboflow = [path for path in inside if path.name.lower() == '_annotations.coco.json']
        for found in (exact[:1], roboflow, named, inside):
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f'{root} has several annotation files for {name}: '
                    f'{", ".join(path.relative_to(root).as_posix() for path in found)}; leave one'
                )
    if alone and split == 'train' and len(loose) == 1:
        return loose[0]
    names = 'annotations/{0}.json, annotations/instances_{0}.json, {0}/_annotations.coco.json, {0}.json'
    there = f'; JSON files: {", ".join(p.relative_to(root).as_posix() for p in loose)}' if loose else ''
    raise _refuse(root, split, f'annotation file for {split} ({names.format(split)}){there}')


def _coco_images(root: Path, split: str, file: Path, content: dict[str, Any]) -> str:
    """Find the folder of the images, relative to the root: the first that holds the first images."""
    sample = content['images'][:20]
    parts = [_find(root, [name]) for name in SPLITS[split]]
    tops = [part for part in parts if part] + [file.parent, file.parent.parent, root]
    folders = []
    for top in tops:
        there = _children(top)
        inner = [there[name] for name in IMAGE_FOLDERS if name in there]
        below = [_find(folder, SPLITS[split]) for folder in inner]
        folders += [*filter(None, below), top, *inner]
    folders = [x for x in dict.fromkeys(folders) if x == root or root in x.parents]
    best, most = None, 0
    for folder in folders:
        lost = Report()
        match_names([dict(image) for image in sample], str(folder), file, lost)
        found = len(sample) - len(lost.found.get('IMG001', ()))
        if found > most:
            best, most = folder, found
    if best is None:
        looked = ', '.join(f'{folder.relative_to(root).as_posix()}/' for folder in folders)
        raise UserError(
            f'{file} names the image {printable(sample[0]["file_name"])}, which is in none of these folders '
            f'of {root}: {looked}; {describe(folders[0])}'
        )
    relative = best.relative_to(root).as_posix()
    return '' if relative == '.' else f'{relative}/'


# ---------------------------------------------------------------- maps


@_reported
def _fit_maps(cfg: Config, root: Path, report: Report) -> tuple[int, list[str]]:
    from .segmentation import match_numbers, pair_maps, scan_maps

    classes = _read_names(root)
    found = {}
    values: dict[int, str] = {}
    images: dict[str, list[Path]] = {}
    for split, (folder, maps) in _splits(cfg, root, _map_folders):
        listing = list_files(folder)
        if not listing.images:
            raise UserError(f'{folder} holds no image that can be read; {describe(folder)}')
        if listing.others:
            report.add('IMG017', f'{folder}: {in_words(listing.others)}')
        suffix = _map_suffix(listing.images, list_files(maps).images)
        pairs = pair_maps(str(folder), str(maps), '', suffix)
        lost = [name for _, name in pairs if not (maps / name).is_file()]
        if lost:
            raise UserError(
                f'{maps} lacks {len(lost)} of the {len(pairs)} maps of images in {folder}, such as '
                f'{printable(lost[0])}; {describe(maps)}'
            )
        shared = repeated(name for _, name in pairs)
        if shared:
            raise UserError(
                f'{folder} has several images that differ in suffix only: their map is {shared[0]}'
            )
        extra = sorted(set(list_files(maps).images) - {name for _, name in pairs})
        report.add('SEG021', *(str(maps / name) for name in extra))
        scan = scan_maps(folder, maps, pairs, report)
        found[split] = (folder, maps, suffix, scan)
        images[split] = [folder / name for name, _ in pairs]
        for value, path in scan.values.items():
            values.setdefault(value, path)
    numbers = match_numbers(values, classes, report)
    report.raise_errors()
    for split, (folder, maps, suffix, scan) in found.items():
        labels = {dict(numbers).get(value, value) for value in scan.values}
        missing = [f'{name!r} ({i})' for i, name in enumerate(classes) if i not in labels]
        if missing:
            report.add('SEG022', f'{maps}: {", ".join(missing)}')
        for dataset in _datasets(cfg, split):
            dataset.update(
                type='emo2_mm.datasets.segmentation.SegDataset',
                data_root=str(root),
                data_prefix=dict(
                    img_path=folder.relative_to(root).as_posix(),
                    seg_map_path=maps.relative_to(root).as_posix(),
                ),
                img_suffix='',
                seg_map_suffix=suffix,
                label_map=numbers,
                metainfo=dict(classes=tuple(classes)),
            )
            for _, part in iter_nodes(dataset.pipeline, 'pipeline'):
                if scan.stored and part.get('type') == 'LoadImageFromFile':
                    part.color_type = 'color_ignore_orientation'
    loaders = [cfg[f'{stage}_dataloader'] for stage in ('train', 'val', 'test')]
    for _, part in iter_nodes([*loaders, cfg.get('tta_pipeline') or []], 'pipeline'):
        if 'reduce_zero_label' in part:  # number 0 is a class
            part.reduce_zero_label = False
    _tell_shared(images)
    return len(images['train']), classes


def _read_names(root: Path) -> list[str]:
    file = _find(root, NAME_FILES, folders=False)
    if file is None:
        what = 'classes.txt, which names the classes, one a line, the one with the number 0 in the maps first'
        raise _refuse(root, 'train', what)
    text, encoding = decode(file.read_bytes(), file)
    if encoding != 'utf-8':
        note(f'{file}: read as {encoding}')
    classes = [line.strip() for line in text.splitlines() if line.strip()]
    if repeated(classes):
        raise UserError(f'{file} names {repeated(classes)[0]!r} twice')
    if len(classes) < 2:
        raise UserError(
            f'{file} names {len(classes)} class, but two or more are needed, one a line, the one with the '
            "number 0 in the maps first (what is no object is one, such as 'background')"
        )
    return classes


def _map_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and maps of a split."""
    there = _children(root)
    tops = {
        kind: [there[name] for name in names if name in there]
        for kind, names in (('images', IMAGE_FOLDERS), ('maps', MAP_FOLDERS))
    }
    for name in SPLITS[split]:
        # images/train and masks/train
        pairs = [[_find(top, [name]) for top in tops[kind]] for kind in ('images', 'maps')]
        own = _find(root, [name])
        if own:  # train/images and train/masks
            pairs[0].append(_find(own, IMAGE_FOLDERS))
            pairs[1].append(_find(own, MAP_FOLDERS))
        # train and train_masks
        pairs[0] += [_find(root, [f'{name}_{kind}' for kind in IMAGE_FOLDERS])]
        pairs[1] += [
            _find(root, [f'{name}{join}{kind}' for join in ('_', '') for kind in (*MAP_FOLDERS, 'annot')])
        ]
        images, maps = (next(filter(None, folders), None) for folders in pairs)
        images = images or (own if maps else None)
        if images and maps:
            return images, maps
        if images:
            raise UserError(
                f'{images} holds images, but there is no folder of maps for {name}, such as masks/{name}; '
                f'{describe(root)}'
            )
    raise _refuse(root, split, f'folders images/{split} and masks/{split}')


def _map_suffix(images: Sequence[str], maps: Sequence[str]) -> str:
    """What maps are called, compared with their images: the suffix that fits most."""
    stems = {os.path.splitext(name)[0] for name in images}
    lower = {name.lower() for name in maps}
    counts = Counter({s: sum(f'{stem}{s}'.lower() in lower for stem in stems) for s in MAP_SUFFIXES})
    suffix, most = counts.most_common(1)[0]
    return suffix if most else MAP_SUFFIXES[0]


# ---------------------------------------------------------------- folders


@_reported
def _fit_folders(cfg: Config, root: Path, report: Report) -> tuple[int, list[str]]:
    folders, counts = {}, {}
    images: dict[str, list[Path]] = {}
    for split, folder in _splits(cfg, root, _class_folders):
        folders[split], images[split] = folder, []
        others: Counter = Counter()
        for name in subfolders(folder):
            listing = list_files(folder / name)
            counts[split, name] = len(listing.images)
            images[split] += [folder / name / image for image in listing.images]
            others += listing.others
        if others:
            report.add('IMG017', f'{folder}: {in_words(others)}')
        loose = [path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
        if loose:
            report.add('IMG017', f'{folder}: {len(loose)} files outside of class folders')
    classes = [name for split, name in counts if split == 'train']
    if len(classes) < 2:
        raise UserError(
            f'{folders["train"]} has to hold a folder for each of two classes or more; '
            f'{describe(folders["train"])}'
        )
    for name in classes:
        if not counts['train', name]:
            folder = folders['train'] / name
            raise UserError(f'{folder} holds no image that can be read; {describe(folder)}')
    found = [name for (split, name), count in counts.items() if split == 'val' and count]
    odd = [name for name in found if name not in classes]
    if odd:
        near = [name for name in classes if name.lower() == odd[0].lower()]
        hint = f' (there is {near[0]})' if near else ''
        raise UserError(
            f'{folders["val"]} has classes that {folders["train"]} lacks: {", ".join(odd)}{hint}; the names '
            'have to be the same'
        )
    if 'val' in folders:
        empty = [name for name in classes if not counts.get(('val', name))]
        if empty:
            report.add('CLS022', f'{folders["val"]}: {", ".join(empty)}')
        if not images['val']:
            raise UserError(f'{folders["val"]} holds no image that can be read; {describe(folders["val"])}')
    for split, folder in folders.items():
        for dataset in _datasets(cfg, split):
            dataset.pop('split', None)  # of ImageNet
            dataset.update(
                type='emo2_mm.datasets.classification.FolderDataset',
                data_root=str(root),
                data_prefix=folder.name,
                metainfo=dict(classes=tuple(classes)),
            )
    if len(classes) < 5:
        for part in (cfg.model.head, cfg.get('val_evaluator'), cfg.get('test_evaluator')):
            if part is not None:
                part.topk = (1,)
    _tell_shared(images)
    return len(images['train']), classes


def _class_folders(root: Path, split: str) -> Path:
    folder = _find(root, SPLITS[split])
    if folder is None:
        raise _refuse(root, split, f'folder {split} with a folder for each class')
    return folder


# data_format -> function of a config, without val_cfg if no validation split is needed, and the folder; it
# returns the number of images to train on and the classes, or raises UserError
FORMATS: dict[str, Fit] = {'coco': _fit_coco, 'maps': _fit_maps, 'folders': _fit_folders}


def _tell_shared(images: dict[str, list[Path]]) -> None:
    """Report images that are in both splits, as links or copies of one name."""
    if 'val' not in images:
        return
    nodes = {path.stat().st_ino for path in images['train']}
    names = {(path.name, path.stat().st_size): path for path in images['train']}
    shared = []
    for path in images['val']:
        twin = names.get((path.name, path.stat().st_size))
        if path.stat().st_ino in nodes or (twin and filecmp.cmp(path, twin, shallow=False)):
            shared.append(path)
    if shared:
        note(
            f'{len(shared)} of {len(images["val"])} images of the validation split are also in the training '
            f'split, such as {printable(str(shared[0]))}: its figures will be too good'
        )
