"""Convert a dataset, split it, and report what was done."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from ...errors import UserError, local_rank, note
from .recognise import FORMATS, recognise
from .records import Dataset, Picture, Report, Thing

CONFIGS = {
    'boxes': 'configs/det/retinanet_emo2_custom.py',
    'maps': 'configs/seg/segformer_emo2_custom.py',
    'folders': 'configs/cls/emo2_custom.py',
}
MARK = 'converted_from.json'


def convert_dataset(
    source: str | os.PathLike,
    target: str | os.PathLike,
    kind: str | None = None,
    to: str | None = None,
    val_fraction: float | None = None,
    copy: bool = False,
    boxes_as_masks: bool = False,
) -> tuple[str, list[str]]:
    """Convert a dataset into what the custom configs read.

    Args:
        source: Folder of the dataset, which stays as it is.
        target: Folder to write, which must be empty or not there yet.
        kind: A key of :data:`~emo2_mm.datasets.convert.FORMATS`; recognised if None.
        to: ``boxes`` (COCO's format, with masks where there are outlines), ``maps`` or ``folders``; what fits
            the format if None.
        val_fraction: Share of the training images to put into a validation split, if there is none.
        copy: Copy the images instead of linking to them.
        boxes_as_masks: Write the box as the outline of an object that has none.

    Returns:
        What was written (a value of ``to``), and a report: counts, and what was left out or changed.

    Raises:
        UserError: If the format is unknown, a file cannot be read, or nothing is left.
    """
    from .readers import READERS

    source, target = Path(source).expanduser(), Path(target).expanduser()
    _check_folders(source, target)
    found = recognise(source)
    kind = kind or found
    if kind is None:
        raise UserError(
            f'{source} is of no format that can be read ({", ".join(FORMATS.values())}); it holds '
            f'{", ".join(sorted(x.name for x in source.iterdir())[:10]) or "nothing"}'
        )
    dataset = READERS[kind](source)
    if not dataset.pictures:
        raise UserError(
            '\n'.join([f'{source} as {FORMATS[kind]}: no image is left', *dataset.report.lines()])
        )
    to = to or {'masks': 'maps', 'folders': 'folders'}.get(kind, 'boxes')
    _check_target(dataset, kind, to)
    splits = split(dataset, val_fraction)
    _report_shared_images(splits, dataset.report)
    temporary = target.with_name(f'{target.name}.part{os.getpid()}')
    try:
        counts = _write(dataset, splits, temporary, to, copy, boxes_as_masks)
        content = dict(source=str(source.absolute()), format=kind, val_fraction=val_fraction)
        (temporary / MARK).write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to, [f'{source}: {FORMATS[kind]}', *_table(dataset, splits, counts), *dataset.report.lines()]


def _check_folders(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f'there is no folder {source.absolute()}')
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f'{target} exists and is not empty; give a new folder')
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f'{target} lies in {source}, which is not to be changed; give a folder elsewhere')


def _check_target(dataset: Dataset, kind: str, to: str) -> None:
    if to == 'folders' and kind != 'folders' or kind == 'folders' and to != 'folders':
        raise UserError(f'{FORMATS[kind]} cannot be converted to {to}')
    if kind == 'masks' and to != 'maps':
        raise UserError(f'{FORMATS[kind]} hold classes, not objects: they can be converted to maps only')
    if not dataset.classes:
        raise UserError('\n'.join(['no object is left', *dataset.report.lines()]))


# ---------------------------------------------------------------- splits


def split(dataset: Dataset, val_fraction: float | None) -> dict[str, list[Picture]]:
    """Sort the pictures by split; those without one are training images.

    Args:
        dataset: The dataset.
        val_fraction: Share of the training images to validate on. They are those whose names have the
            smallest SHA-1: the same in each run, and after images were added all but the same. Each class of
            a classification dataset is split; of one with objects, the images with each rarest class.

    Raises:
        UserError: If there is a validation split already, or too few images.
    """
    splits: dict[str, list[Picture]] = {'train': [], 'val': [], 'test': []}
    for picture in dataset.pictures:
        splits[picture.split or 'train'].append(picture)
    if val_fraction is None:
        return splits
    if splits['val']:
        raise UserError(
            f'val_fraction is {val_fraction}, but there is a validation split of {len(splits["val"])} images '
            'already: leave val_fraction out'
        )
    groups = defaultdict(list)
    images_of = Counter(label for picture in splits['train'] for label in {x.label for x in picture.things})
    for picture in splits['train']:
        rarest = min((thing.label for thing in picture.things), key=lambda x: (images_of[x], x), default=None)
        groups[picture.label, rarest].append(picture)
    splits['train'] = []
    for (label, _), group in sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0]))):
        ranked = sorted(
            group, key=lambda picture: hashlib.sha1(picture.path.name.encode('utf-8', 'replace')).digest()
        )
        number = math.floor(len(ranked) * val_fraction + 0.5)
        if label is not None or not splits['val']:  # each class is seen in both, or at least something
            number = max(1, number)
        if number >= len(ranked) and (label is not None or len(groups) == 1):
            of = f'class {label}' if label is not None else 'the dataset'
            raise UserError(
                f'val_fraction={val_fraction} leaves no training image of {of}: it has {len(ranked)}'
            )
        splits['val'] += ranked[:number]
        splits['train'] += ranked[number:]
    return {name: sorted(part, key=lambda picture: picture.path) for name, part in splits.items()}


def _report_shared_images(splits: dict[str, list[Picture]], report: Report) -> None:
    """Report images that are in two splits, whatever their names; only files of equal size are read."""
    sizes = defaultdict(list)
    for name, pictures in splits.items():
        for picture in pictures:
            if picture.data is None:
                sizes[picture.path.stat().st_size].append((name, picture.path))
    for files in sizes.values():
        if len({name for name, _ in files}) < 2:
            continue
        seen: dict[bytes, tuple[str, Path]] = {}
        for name, path in files:
            first = seen.setdefault(hashlib.sha1(path.read_bytes()).digest(), (name, path))
            if first[0] != name:
                what = f'image of {name} is also in {first[0]}: an evaluation on it is no test'
                report.add(what, f'{path} and {first[1]}')


# ---------------------------------------------------------------- writing


def _write(
    dataset: Dataset,
    splits: dict[str, list[Picture]],
    target: Path,
    to: str,
    copy: bool,
    boxes_as_masks: bool,
) -> dict[str, Counter]:
    """Write the splits that have pictures; return the numbers of objects, pixels or images of each class."""
    target.mkdir(parents=True)
    counts = {}
    for name, pictures in splits.items():
        if pictures and to == 'folders':
            counts[name] = _write_folders(pictures, target / name, copy)
        elif pictures:
            names = _place_images(pictures, target / 'images' / name, copy)
            if to == 'boxes':
                file = target / 'annotations' / f'{name}.json'
                counts[name] = _write_coco(pictures, names, dataset, file, boxes_as_masks)
            else:
                counts[name] = _write_maps(pictures, names, dataset, target / 'masks' / name)
    if to == 'maps':
        classes = _map_classes(dataset)
        (target / 'classes.txt').write_text(''.join(f'{name}\n' for name in classes), encoding='utf-8')
    return counts


def _place_images(pictures: list[Picture], folder: Path, copy: bool) -> list[str]:
    """Link or copy the images of a split into one folder; return their names there, each once."""
    folder.mkdir(parents=True)
    taken: Counter = Counter(picture.path.stem.lower() for picture in pictures)
    names, stems = [], set()
    for picture in pictures:
        stem = picture.path.stem
        if taken[stem.lower()] > 1:  # in folders of their own before
            stem = f'{picture.path.parent.name}_{stem}'
        base, number = stem, 2
        while stem.lower() in stems:
            stem, number = f'{base}_{number}', number + 1
        stems.add(stem.lower())
        names.append(f'{stem}{picture.path.suffix}')
        _place(picture, folder / names[-1], copy)
    return names


def _place(picture: Picture, place: Path, copy: bool) -> None:
    if picture.data is not None:
        place.write_bytes(picture.data)
    elif copy:
        shutil.copyfile(picture.path, place)
    else:
        try:
            place.symlink_to(picture.path.resolve())
        except OSError:  # no links on this disk, or not allowed
            shutil.copyfile(picture.path, place)


def _write_coco(
    pictures: list[Picture], names: list[str], dataset: Dataset, file: Path, boxes_as_masks: bool
) -> Counter:
    numbers = {name: i + 1 for i, name in enumerate(dataset.classes)}
    content: dict[str, list] = {'images': [], 'annotations': [], 'categories': []}
    content['categories'] = [dict(id=number, name=name) for name, number in numbers.items()]
    counts: Counter = Counter()
    for picture, name in zip(pictures, names):
        width, height = picture.size
        number = len(content['images']) + 1
        content['images'].append(dict(id=number, file_name=name, width=width, height=height))
        for thing in picture.things:
            left, top, right, bottom = thing.box
            outline = _outline(thing, boxes_as_masks)
            box = [round(x, 3) for x in (left, top, right - left, bottom - top)]
            content['annotations'].append(
                dict(
                    id=len(content['annotations']) + 1,
                    image_id=number,
                    category_id=numbers[thing.label],
                    bbox=box,
                    area=_area(thing, outline),
                    iscrowd=int(thing.crowd),
                    **({} if outline is None else dict(segmentation=outline)),
                )
            )
            counts[thing.label] += 1
            if outline is None:
                counts[None] += 1
    if counts[None] and counts[None] < sum(counts.values()) - counts[None]:
        dataset.report.add(
            'file has objects without an outline: Mask R-CNN needs --boxes-as-masks', file.name
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    return counts


def _outline(thing: Thing, boxes_as_masks: bool) -> Any:
    if thing.rle is not None:
        return thing.rle
    if thing.polygons:
        return [[round(x, 3) for x in polygon] for polygon in thing.polygons]
    left, top, right, bottom = (round(x, 3) for x in thing.box)
    return [[left, top, right, top, right, bottom, left, bottom]] if boxes_as_masks else None


def _area(thing: Thing, outline: Any) -> float:
    """Area of the outline, else of the box, in pixels."""
    left, top, right, bottom = thing.box
    if not thing.polygons:
        return round((right - left) * (bottom - top), 3)
    total = 0.0
    for polygon in thing.polygons:
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        total += 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    return round(float(total), 3)


def _map_classes(dataset: Dataset) -> list[str]:
    """Classes of the maps: those of masks, or of objects with the ground before them."""
    if any(picture.map for picture in dataset.pictures):
        return dataset.classes
    return ['background', *dataset.classes]


def _write_maps(pictures: list[Picture], names: list[str], dataset: Dataset, folder: Path) -> Counter:
    from PIL import Image

    folder.mkdir(parents=True)
    classes = _map_classes(dataset)
    if len(classes) > 255:
        raise UserError(f'{len(classes)} classes do not fit into a map: 255 is the limit')
    counts: Counter = Counter()
    for picture, name in zip(pictures, names):
        pixels = picture.map() if picture.map else _draw(picture, classes, dataset.report)
        Image.fromarray(pixels).save(folder / f'{Path(name).stem}.png')
        values, numbers = np.unique(pixels, return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist()):
            counts[classes[value] if value < len(classes) else None] += number
    return counts


def _draw(picture: Picture, classes: list[str], report: Report) -> np.ndarray:
    """Draw the outlines of a picture's objects into a map, the larger ones first."""
    from PIL import Image, ImageDraw

    width, height = picture.size
    image = Image.new('L', (width, height))
    draw = ImageDraw.Draw(image)
    pixels = None
    for thing in sorted(picture.things, key=lambda thing: -_area(thing, None)):
        number = classes.index(thing.label)
        if thing.crowd:
            number = 255
        if thing.rle is not None:
            pixels = np.array(image)
            pixels[_decode(thing.rle, picture.size)] = number
            image = Image.fromarray(pixels)
            draw = ImageDraw.Draw(image)
            continue
        if not thing.polygons:
            report.add('object has no outline: its box is drawn', picture.path)
        for polygon in _outline(thing, boxes_as_masks=True):
            draw.polygon(polygon, fill=number)
    return np.array(image)


def _decode(rle: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask

    if isinstance(rle['counts'], list):
        rle = mask.frPyObjects(rle, *rle['size'])
    pixels = mask.decode(rle).astype(bool)
    if pixels.shape != size[::-1]:
        raise UserError(f'a mask in run lengths has the size {pixels.shape[::-1]}, its image {size}')
    return pixels


def _write_folders(pictures: list[Picture], folder: Path, copy: bool) -> Counter:
    counts: Counter = Counter()
    by_class: dict[Any, list[Picture]] = defaultdict(list)  # by label: each picture has one
    for picture in pictures:
        by_class[picture.label].append(picture)
    for label, group in sorted(by_class.items()):
        _place_images(group, folder / label, copy)
        counts[label] = len(group)
    return counts


# ---------------------------------------------------------------- report


def _table(dataset: Dataset, splits: dict[str, list[Picture]], counts: dict[str, Counter]) -> list[str]:
    there = [name for name, pictures in splits.items() if pictures]
    rows = [['', *there], ['images', *(str(len(splits[name])) for name in there)]]
    empty = [sum(not x.things for x in splits[name]) for name in there]
    if any(empty) and all(x.map is None and x.label is None for x in dataset.pictures):
        rows.append(['  without objects', *map(str, empty)])
    unit = 'pixels of' if any(x.map for x in dataset.pictures) else ''
    names: Iterable[Any] = dict.fromkeys(
        [*dataset.classes, *(x for name in there for x in counts[name] if x)]
    )
    rows += [[f'{unit} {label}'.strip(), *(str(counts[name][label]) for name in there)] for label in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  ' + '  '.join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    if 'val' not in there:
        lines.append('  no validation split: give --val-fraction 0.2, or train with val_fraction=0.2')
    return lines


def split_dataset(root: Path, data_format: str, val_fraction: float, work_dir: str | os.PathLike) -> Path:
    """Split a dataset without a validation split, as a folder of links in the work dir.

    Args:
        root: Folder of the dataset, which stays as it is.
        data_format: ``coco``, ``maps`` or ``folders``, what a custom config reads.
        val_fraction: Share of the images to validate on.
        work_dir: The folder ``split_data`` is written there; of several processes, the first does so.

    Returns:
        The folder to read in place of ``root``.
    """
    target = Path(work_dir) / 'split_data'
    if local_rank() == 0:
        if target.is_dir() and not (target / MARK).is_file():
            raise UserError(f'{target} was not written by val_fraction: move it away')
        formats = {'coco': ('coco', 'boxes'), 'maps': ('masks', 'maps'), 'folders': ('folders', 'folders')}
        new = target.with_name('split_data.new')
        shutil.rmtree(new, ignore_errors=True)  # of a run that was broken off
        new.parent.mkdir(parents=True, exist_ok=True)
        _, lines = convert_dataset(root, new, *formats[data_format], val_fraction)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
        note('\n'.join([f'val_fraction={val_fraction}: {target} has links to', *lines]))
    for _ in range(600):
        if (target / MARK).is_file():
            return target
        time.sleep(1)
    raise UserError(f'{target} was not written by the first process within 10 minutes')
