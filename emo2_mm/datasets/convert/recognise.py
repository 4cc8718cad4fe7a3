"""Recognise the format of a dataset from its files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files import IMAGE_SUFFIXES
from .files import files_in, read_text

FORMATS = {
    'yolo': 'YOLO',
    'cvat': 'CVAT XML',
    'voc': 'Pascal VOC',
    'coco': 'COCO',
    'labelme': 'LabelMe',
    'masks': 'images with masks',
    'folders': 'folders of classes',
}
MASK_FOLDERS = ('masks', 'mask', 'labels', 'annotations', 'segmentationclass', 'gt', 'labelcolors')
SAMPLE = 20  # files of a kind that are looked into
HEAD = 1 << 16


def recognise(folder: str | os.PathLike) -> str | None:
    """Recognise the format of the dataset in a folder.

    Args:
        folder: The folder.

    Returns:
        A key of :data:`FORMATS`, or None.
    """
    root = Path(folder)
    if not root.is_dir():
        return None
    texts = files_in(root, '.yaml', '.yml', '.txt', '.xml', '.json')
    kinds = {suffix: [x for x in texts if x.suffix.lower() == suffix] for suffix in ('.txt', '.xml', '.json')}
    if any(_is_yolo_yaml(path) for path in texts if path.suffix.lower() in ('.yaml', '.yml')):
        return 'yolo'
    for path in kinds['.xml'][:SAMPLE]:
        head = _head(path)
        if '<annotations' in head:
            return 'cvat'
        if '<annotation' in head:
            return 'voc'
    for path in kinds['.json'][:SAMPLE]:
        text = _head(path) + _head(path, end=True)
        if '"shapes"' in text:
            return 'labelme'
        if '"annotations"' in text or '"images"' in text and '"categories"' in text:
            return 'coco'
    if any(_is_yolo_label(path) for path in kinds['.txt'][:SAMPLE]):
        return 'yolo'
    images = files_in(root, *IMAGE_SUFFIXES)
    folders = {part.lower() for path in images for part in path.relative_to(root).parts[:-1]}
    if folders & set(MASK_FOLDERS) or any(path.stem.lower().endswith('_mask') for path in images):
        return 'masks'
    depths = {len(path.relative_to(root).parts) for path in images}
    return 'folders' if images and 1 not in depths else None


def _head(path: Path, end: bool = False) -> str:
    with path.open('rb') as file:
        if end:
            file.seek(max(0, path.stat().st_size - HEAD))
        return file.read(HEAD).replace(b'\0', b'').decode('utf-8', 'replace')  # UTF-16, too


def _is_yolo_yaml(path: Path) -> bool:
    return bool(re.search(r'^names\s*:', read_text(path), re.MULTILINE))


def _is_yolo_label(path: Path) -> bool:
    """Whether all lines are a number of a class and coordinates."""
    lines = [line.split() for line in _head(path).splitlines()[:SAMPLE] if line.strip()]
    number = re.compile(r'-?\d+(\.\d*)?([eE][-+]?\d+)?$')
    return bool(lines) and all(
        len(line) >= 5 and line[0].isdigit() and all(number.match(x) for x in line) for line in lines
    )
