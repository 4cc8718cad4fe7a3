"""Check annotation files in COCO's format, and their images."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from typing import Any

from mmengine.config import ConfigDict

from ..coco_file import read_coco
from ..report import Report
from .images import read_all, read_image


def check_coco(dataset: Any, leaf: ConfigDict, model: ConfigDict, report: Report) -> str:
    """Check a CocoDataset, and its masks if the pipeline loads them."""
    file, folder = dataset.ann_file, dataset.data_prefix.get('img', '')
    steps = leaf.get('pipeline', [])
    stored = any(step.get('color_type') == 'color_ignore_orientation' for step in steps)
    own = Report()
    content = read_coco(
        file,
        own,
        classes=dataset.metainfo['classes'],
        folder=folder,
        verify=True,
        masks=any(step.get('with_mask') for step in steps),
        ignore_orientation=stored,
    )
    own.found.pop('IMG001', None)  # found below, too
    if own.found.get('COCO046') and not getattr(dataset, 'verify_images', False):
        own.add('COCO007', *own.found.pop('COCO046'))
    elif own.found.get('COCO046'):
        stored = True
    for code, places in own.found.items():
        report.add(code, *places)

    used = {c['id'] for c in content['categories'] if c['name'] in dataset.metainfo['classes']}
    objects = defaultdict(list)
    for annotation in content['annotations']:
        if annotation['category_id'] in used:
            objects[annotation['image_id']].append(annotation)
    filters = {} if dataset.test_mode else dataset.filter_cfg or {}
    left = 0
    flag = 'color_ignore_orientation' if stored else 'color'
    paths = [os.path.join(folder, image['file_name']) for image in content['images']]
    pictures = read_all(lambda path: read_image(path, flag), paths, file)
    for image, (path, picture) in zip(content['images'], pictures):
        for code in picture.codes:
            report.add(code, path)
        size = image.get('width', 0), image.get('height', 0)
        small = min(size) < filters.get('min_size', 0)
        if small:
            report.add('COCO053', f'{path}: {size}')
        empty = not objects[image['id']]
        dropped = empty and bool(filters.get('filter_empty_gt'))
        if empty:
            report.add('COCO052' if dropped else 'COCO051', path)
        left += not (small or dropped)
        for annotation in objects[image['id']]:
            fault = None if annotation.get('ignore') else box_code(annotation['bbox'], *size)
            if fault:
                place = f'{file}: annotation {annotation["id"]!r} of {image["file_name"]}'
                report.add(fault, f'{place}: {annotation["bbox"]} in {size}')
    if not left:
        report.add('IMG006', f'{file}: {len(content["images"])}, of which it uses none')
    return f'{file}: {len(content["images"])} images, {len(content["annotations"])} annotations'


def box_code(box: list, width: float, height: float) -> str | None:
    """Code of what is wrong with a box (x, y, width, height), in pixels, in an image of this size."""
    x, y, w, h = box
    if not all(map(math.isfinite, box)):
        return 'COCO039'
    if w <= 0 or h <= 0:
        return 'COCO054'
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return 'COCO055'
    if w < 1 or h < 1:
        return 'COCO056'
    if min(x, y) <= -1 or x + w >= width + 1 or y + h >= height + 1:  # less comes from rounding
        return 'COCO057'
    return None
