"""Folders of images and label maps: a dataset for them, and what the numbers in the maps stand for.

Needs MMSegmentation.
"""

from __future__ import annotations

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np
from mmseg.datasets import BaseSegDataset
from PIL import Image

from .files import IMAGE_SUFFIXES, list_files, read_header
from .report import Report

IGNORED = 255


class SegDataset(BaseSegDataset):
    """MMSegmentation's ``BaseSegDataset`` for images of any suffix, in any case, and other numbers in maps.

    Args:
        img_suffix: Suffix of the images. Defaults to '': all that can be loaded.
        seg_map_suffix: What the name of a map has in place of the image's suffix, in any case.
        label_map: Pairs ``(number in the maps, class)`` of numbers that differ. Defaults to none.
        **kwargs: Arguments of ``BaseSegDataset``.
    """

    def __init__(
        self,
        *args: Any,
        img_suffix: str = '',
        seg_map_suffix: str = '.png',
        label_map: Sequence[Sequence[int]] = (),
        **kwargs: Any,
    ) -> None:
        self.numbers = {int(number): int(label) for number, label in label_map}
        super().__init__(*args, img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List images and their maps."""
        self.label_map: dict[int, int] | None = self.numbers or self.label_map
        images, maps = self.data_prefix.get('img_path'), self.data_prefix.get('seg_map_path')
        remote = self.backend_args and self.backend_args.get('backend') not in ('local', 'LocalBackend')
        if remote or (self.ann_file and not os.path.isdir(self.ann_file)):
            return super().load_data_list()
        pairs = pair_maps(images, maps, self.img_suffix, self.seg_map_suffix)
        shared = dict(label_map=self.label_map, reduce_zero_label=self.reduce_zero_label)
        samples = []
        for image, path in pairs:
            sample = dict(img_path=os.path.join(images, image), seg_fields=[], **shared)
            if maps is not None:
                sample['seg_map_path'] = os.path.join(maps, path)
            samples.append(sample)
        return samples


def pair_maps(
    images: str, maps: str | None, img_suffix: str = '', seg_map_suffix: str = '.png'
) -> list[tuple[str, str]]:
    """List images with the names that their maps have, or should have, relative to their folders."""
    names = list_files(images, _kinds(img_suffix)).images
    names = [name for name in names if name.lower().endswith(img_suffix.lower())]
    there = {}
    if maps is not None and os.path.isdir(maps):
        there = {name.lower(): name for name in list_files(maps, _kinds(seg_map_suffix)).images}
    pairs = []
    for name in names:
        stem = name[: -len(img_suffix)] if img_suffix else os.path.splitext(name)[0]
        path = stem + seg_map_suffix
        pairs.append((name, path if path in there.values() else there.get(path.lower(), path)))
    return pairs


def _kinds(suffix: str) -> tuple[str, ...]:
    """Suffixes as a walker takes them, of one such as ``_mask.png``; all for none."""
    return ('.' + suffix.lower().rsplit('.', 1)[-1],) if suffix else IMAGE_SUFFIXES


class LabelMap(NamedTuple):
    """A map: its size (width, height), the numbers in it, and the code of what is wrong with it."""

    size: tuple[int, int] | None
    values: tuple[int, ...]
    code: str | None


def read_map(path: str | os.PathLike) -> LabelMap:
    """Read a map as MMSegmentation's ``LoadAnnotations`` does, which takes indices of palettes."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except FileNotFoundError:
        return LabelMap(None, (), 'SEG001')
    except Exception:  # of many kinds, depending on the format
        return LabelMap(None, (), 'SEG002')
    height, width = pixels.shape[:2]
    if pixels.ndim > 2:
        return LabelMap((width, height), (), 'SEG003')
    values = tuple(np.unique(pixels).astype(int).tolist())
    code = 'SEG004' if min(width, height) == 1 else None
    if values[0] < 0 or values[-1] > 255:
        code = 'SEG006'
    return LabelMap((width, height), values, code)


class Scan(NamedTuple):
    """What the maps of a split hold.

    Attributes:
        values: number -> the first map with it.
        stored: Whether maps fit the images as they are stored, without their EXIF orientation.
    """

    values: dict[int, str]
    stored: bool


def scan_maps(images: Path, maps: Path, pairs: Sequence[tuple[str, str]], report: Report) -> Scan:
    """Read all maps and the sizes of their images."""

    def read(pair: tuple[str, str]) -> tuple[LabelMap, Any]:
        return read_map(maps / pair[1]), read_header(images / pair[0])

    values: dict[int, str] = {}
    votes: dict[bool, list[str]] = {True: [], False: []}
    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        for (_, name), (found, header) in zip(pairs, pool.imap(read, pairs, chunksize=8)):
            path = str(maps / name)
            if found.code:
                report.add(found.code, path + (f': {found.values[-1]}' if found.code == 'SEG006' else ''))
            for value in found.values:
                values.setdefault(value, path)
            if found.size is None or header is None:
                continue
            if header.stored != header.displayed and found.size in (header.stored, header.displayed):
                votes[found.size == header.stored].append(path)
            elif found.size != header.displayed:
                report.add('SEG005', f'{path}: {found.size}, image {header.displayed}')
            elif header.orientation != 1:
                report.add('IMG018', f'{path}: {header.orientation}')
    if votes[True] and votes[False]:
        report.add(
            'SEG005', f'{votes[True][0]} is drawn without, {votes[False][0]} with the EXIF orientation'
        )
    report.add('SEG024', *votes[True])
    return Scan(values, bool(votes[True]))


def match_numbers(values: dict[int, str], classes: Sequence[str], report: Report) -> list[tuple[int, int]]:
    """Find what the numbers in maps stand for, where they are not 0, 1, 2 ... and 255 for 'no class'.

    Args:
        values: number -> a map that has it, of all splits.
        classes: Names of the classes.
        report: Takes what was found.

    Returns:
        Pairs ``(number, class)``; none if the numbers are those of the classes, or cannot be understood.
    """
    numbers, count = sorted(values), len(classes)
    used = [number for number in numbers if number != IGNORED]
    if numbers == [IGNORED]:
        report.add('SEG008', f'{values[IGNORED]}')
    elif count == 2 and len(numbers) == 2 and numbers[0] == 0 and numbers[1] > 1:
        report.add('SEG023', f'{values[numbers[1]]}: 0 and {numbers[1]} only: {numbers[1]} is {classes[1]!r}')
        return [(numbers[1], 1)]
    elif used and used[0] >= 1 and used[-1] == count:
        report.add('SEG023', f'{values[count]}: 1 to {count}, no 0: 1 is {classes[0]!r}, and so on')
        return [(number, number - 1) for number in range(1, count + 1)]
    else:
        wrong = [number for number in used if number >= count]
        if wrong:
            some = ', '.join(map(str, wrong[:8])) + (' ...' if len(wrong) > 8 else '')
            report.add(
                'SEG007',
                f'{values[wrong[0]]}: {some}; {count} classes are 0 to {count - 1}, and 255 is none',
            )
    return []
