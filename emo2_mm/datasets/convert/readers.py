"""Readers of the formats: each takes the folder of a dataset and returns its pictures and classes."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from PIL import Image

from ...errors import UserError
from ..files import IMAGE_SUFFIXES, read_header
from .files import (
    ImageIndex,
    files_in,
    images_of_splits,
    read_json,
    read_text,
    split_of,
)
from .recognise import MASK_FOLDERS
from .records import Dataset, Picture, Report, Thing, add_thing, box_of

CIRCLE_POINTS = 36


def image_size(source: Path | io.BytesIO) -> tuple[int, int] | None:
    """Width and height as the loader sees them, which honours the orientation of EXIF; None if damaged."""
    header = read_header(source)
    return None if header is None else header.displayed


def _picture(path: Path | None, split: str | None, named: object, report: Report) -> Picture | None:
    """A picture without objects, unless its file is missing or damaged, which is reported."""
    if path is None:
        report.add('image is missing: left out', named)
        return None
    size = image_size(path)
    if size is None:
        report.add('image is damaged: left out', path)
        return None
    return Picture(path, size, split)


def _check_size(picture: Picture, size: tuple[Any, Any], report: Report) -> None:
    try:
        listed = int(float(size[0] or 0)), int(float(size[1] or 0))
    except (TypeError, ValueError):
        return
    if 0 not in listed and listed != picture.size:
        text = f'{picture.path}: {listed} for {picture.size}'
        report.add(
            'image has another size than its annotations say: its coordinates are taken as pixels', text
        )


# ---------------------------------------------------------------- COCO


def read_coco(root: Path) -> Dataset:
    """COCO: JSON files with images, annotations and categories."""
    report, index = Report(), ImageIndex(root)
    pictures, names, used = [], {}, set()
    for file in files_in(root, '.json'):
        content = read_json(file, report)
        if not isinstance(content, dict) or not isinstance(content.get('images'), list):
            continue
        split = split_of(file.relative_to(root))
        categories = {x.get('id'): str(x.get('name')) for x in content.get('categories') or []}
        names.update(dict.fromkeys(categories[key] for key in sorted(categories, key=str)))
        by_image = defaultdict(list)
        for annotation in content.get('annotations') or []:
            by_image[annotation.get('image_id')].append(annotation)
        for image in content['images']:
            name = str(image.get('file_name', ''))
            picture = _picture(index.find(name, file.parent, split), split, f'{file}: {name}', report)
            annotations = by_image.pop(image.get('id'), [])
            if picture is None:
                continue
            _check_size(picture, (image.get('width'), image.get('height')), report)
            for annotation in annotations:
                where = f'{file}: annotation {annotation.get("id")}'
                label = categories.get(annotation.get('category_id'))
                if label is None:
                    report.add('category id is unknown: object left out', where)
                    continue
                thing = _coco_thing(annotation, label, where, report)
                if thing is not None:
                    used.add(label)
                    add_thing(picture, thing, report, where)
            pictures.append(picture)
        for key, lost in by_image.items():
            report.found['object is of an unknown image: left out'] += [f'{file}: image {key}'] * len(lost)
    roots = [name for name in names if name not in used]
    for name in roots:
        report.add('category has no object: no class', name)
    return Dataset(pictures, [name for name in names if name in used], report)


def _coco_thing(annotation: dict[str, Any], label: str, where: str, report: Report) -> Thing | None:
    outline, box = annotation.get('segmentation'), annotation.get('bbox')
    polygons = rle = None
    if isinstance(outline, dict) and 'counts' in outline:
        rle = outline
    elif isinstance(outline, list) and outline:
        outline = [outline] if isinstance(outline[0], (int, float)) else outline
        polygons = [x for x in outline if isinstance(x, list) and len(x) >= 6 and len(x) % 2 == 0]
        if len(polygons) < len(outline):
            report.add('outline has an odd number of values or less than three points: left out', where)
    if isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box):
        left, top, width, height = box
        edges = (left, top, left + width, top + height)
    elif polygons:
        edges = box_of([x for polygon in polygons for x in polygon])
        report.add('box is missing: taken from the outline', where)
    else:
        report.add('object has no box and no outline: left out', where)
        return None
    crowd = annotation.get('iscrowd', 0) == 1
    if crowd:
        report.add('object is a crowd (iscrowd): kept, neither trained on nor counted', where)
    return Thing(label, edges, polygons or None, rle, crowd)


# ---------------------------------------------------------------- YOLO


def read_yolo(root: Path) -> Dataset:
    """YOLO: data.yaml or classes.txt, and a text of boxes or segments for each image."""
    report = Report()
    settings, folder = {}, root
    for path in files_in(root, '.yaml', '.yml'):
        try:
            content = yaml.safe_load(read_text(path, report))
        except yaml.YAMLError as error:
            raise UserError(f'{path} is not YAML: {error}') from None
        if isinstance(content, dict) and 'names' in content:
            settings, folder = content, path.parent
            break
    classes = _yolo_names(settings, root, report)
    keypoints = bool(settings.get('kpt_shape'))
    pictures = []
    for image, split in _yolo_images(settings, folder, root, report):
        picture = _picture(image, split, image, report)
        if picture is None:
            continue
        file = _yolo_label(image, root)
        if file is None:
            report.add('image has no label file: taken as background', image)
        else:
            for number, line in enumerate(read_text(file, report).splitlines(), 1):
                if line.strip():
                    _add_yolo_line(picture, line.split(), classes, keypoints, report, f'{file}:{number}')
        pictures.append(picture)
    return Dataset(pictures, classes, report)


def _yolo_names(settings: dict[str, Any], root: Path, report: Report) -> list[str]:
    names = settings.get('names')
    if isinstance(names, dict):
        highest = max((int(key) for key in names), default=-1)
        by_number = {int(key): str(name) for key, name in names.items()}
        return [by_number.get(i, f'class_{i}') for i in range(highest + 1)]
    if isinstance(names, list):
        return [str(name) for name in names]
    for path in files_in(root, '.txt', '.names'):
        if path.name.lower() in ('classes.txt', 'obj.names', 'names.txt'):
            return [line.strip() for line in read_text(path, report).splitlines() if line.strip()]
    raise UserError(
        f'{root} has labels of YOLO, but no names of classes: add a classes.txt with a class a line, that of '
        'number 0 first, or a data.yaml with names'
    )


def _yolo_images(
    settings: dict[str, Any], folder: Path, root: Path, report: Report
) -> Iterator[tuple[Path, str | None]]:
    """Images of the splits that data.yaml names; else all images, each with the split in its path."""
    named = {
        split: settings.get(key) for split, key in (('train', 'train'), ('val', 'val'), ('test', 'test'))
    }
    named['val'] = named['val'] or settings.get('valid')
    tops = [folder, folder / str(settings.get('path') or ''), root]
    seen = set()
    for split, values in named.items():
        for value in values if isinstance(values, list) else [values] if values else []:
            relative = re.sub(r'^(\.{1,2}[/\\])+', '', str(value)).replace('\\', '/')
            # Roboflow writes ../train/images for a folder beside the file
            place = next(
                (top / x for top in tops for x in (str(value), relative) if (top / x).exists()), None
            )
            if place is None:
                report.add(f'data.yaml names {split} images that are not there', value)
                continue
            for image in _yolo_place(place, tops):
                if image.resolve() not in seen:
                    seen.add(image.resolve())
                    yield image, split
    if not seen:
        yield from images_of_splits(root)


def _yolo_place(place: Path, tops: list[Path]) -> Iterator[Path]:
    if place.is_dir():
        yield from files_in(place, *IMAGE_SUFFIXES)
        return
    for line in read_text(place).splitlines():
        name = line.strip()
        found = [top / name for top in (place.parent, *tops) if name and (top / name).is_file()]
        yield from found[:1]


def _yolo_label(image: Path, root: Path) -> Path | None:
    """The text of an image: beside it, or in the folder labels beside images."""
    parts = list(image.parts)
    places = [image.with_suffix('.txt')]
    for i in reversed(range(len(parts) - 1)):
        if parts[i].lower() == 'images':
            places.insert(0, Path(*parts[:i], 'labels', *parts[i + 1 :]).with_suffix('.txt'))
    places.append(root / 'labels' / f'{image.stem}.txt')
    return next((place for place in places if place.is_file()), None)


def _add_yolo_line(
    picture: Picture, fields: list[str], classes: list[str], keypoints: bool, report: Report, where: str
) -> None:
    try:
        number, values = float(fields[0]), [float(x) for x in fields[1:]]
    except ValueError:
        report.add('line is not of numbers: left out', where)
        return
    if number != int(number) or not 0 <= number < len(classes):
        report.add(f'class number is not 0 to {len(classes) - 1}: object left out', where)
        return
    width, height = picture.size
    is_box = len(values) in (4, 5) or keypoints and len(values) > 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        report.add(f'line has {len(values) + 1} values: no box, no segment, left out', where)
        return
    if keypoints and len(values) > 4:
        report.add('key points are left out, the box is kept', where)
    elif len(values) == 5:
        report.add('line has a score: left out, the box is kept', where)
    if max(map(abs, values[:4] if is_box else values)) > 2:
        report.add('coordinates are no shares of the image (0 to 1): object left out', where)
        return
    if is_box:
        x, y, w, h = (v * side for v, side in zip(values, (width, height, width, height)))
        thing = Thing(classes[int(number)], (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    else:
        points = [v * (width, height)[i % 2] for i, v in enumerate(values)]
        thing = Thing(classes[int(number)], box_of(points), [points])
    add_thing(picture, thing, report, where)


# ---------------------------------------------------------------- Pascal VOC and CVAT


def read_xml(path: Path, report: Report) -> ElementTree.Element:
    """Parse an XML file in the encoding that it declares, or in the one that :func:`read_text` finds.

    Raises:
        UserError: If it is not XML.
    """
    data = path.read_bytes()
    declared = re.match(rb'\s*<\?xml[^>]*encoding=["\']([\w.-]+)', data)
    try:  # not by the parser, which takes encodings of several bytes for those of one
        text = data.decode(declared[1].decode()) if declared else read_text(path, report)
    except (LookupError, UnicodeDecodeError):
        text = read_text(path, report)
    try:
        return ElementTree.fromstring(re.sub(r'^\ufeff?\s*<\?xml[^>]*\?>', '', text))
    except ElementTree.ParseError as error:
        raise UserError(f'{path} is not XML: {error}') from None


def read_voc(root: Path) -> Dataset:
    """Pascal VOC: an XML file for each image; ImageSets/Main tells the splits."""
    report, index = Report(), ImageIndex(root)
    splits = {}
    for subset in ('test', 'val', 'train'):  # of an image in several, the last counts
        for file in files_in(root, '.txt'):
            if file.stem.lower() == subset and file.parent.name.lower() in (
                'main',
                'segmentation',
                'imagesets',
            ):
                lines = read_text(file, report).splitlines()
                splits.update({line.split()[0]: subset for line in lines if line.strip()})
    pictures, classes = [], set()
    for file in files_in(root, '.xml'):
        tree = read_xml(file, report)
        if tree.tag != 'annotation':
            continue
        name = tree.findtext('filename') or file.stem
        split = splits.get(file.stem) or split_of(file.relative_to(root).parent / 'x')
        path = index.find(name, file.parent, split) or index.find(file.stem, file.parent, split)
        picture = _picture(path, split, f'{file}: {name}', report)
        if picture is None:
            continue
        _check_size(picture, (tree.findtext('size/width'), tree.findtext('size/height')), report)
        for i, node in enumerate(tree.findall('object')):
            where = f'{file}: object {i + 1}'
            label = (node.findtext('name') or '').strip()
            try:
                edges = [
                    float(node.findtext(f'bndbox/{key}') or '') for key in ('xmin', 'ymin', 'xmax', 'ymax')
                ]
            except ValueError:
                report.add('object has no box: left out', where)
                continue
            if not label:
                report.add('object has no name: left out', where)
                continue
            difficult = node.findtext('difficult') == '1'
            if difficult:
                report.add('object is difficult: written as iscrowd, neither trained on nor counted', where)
            if node.findtext('truncated') == '1':
                report.add('object is truncated: kept', where)
            classes.add(label)
            add_thing(picture, Thing(label, tuple(edges), crowd=difficult), report, where)
        pictures.append(picture)
    return Dataset(pictures, sorted(classes), report)


def read_cvat(root: Path) -> Dataset:
    """CVAT for images 1.1: one XML file with all images; that for video holds tracks, which are refused."""
    report, index = Report(), ImageIndex(root)
    pictures, named, classes = [], {}, set()
    for file in files_in(root, '.xml'):
        tree = read_xml(file, report)
        if tree.tag != 'annotations':
            continue
        if tree.find('track') is not None:
            raise UserError(
                f'{file} holds tracks of a video (CVAT for video 1.1); export it as "CVAT for images 1.1" '
                'with its images'
            )
        named.update(dict.fromkeys(x.text or '' for x in tree.iterfind('.//meta//labels/label/name')))
        for image in tree.iterfind('image'):
            name = image.get('name', '')
            split = split_of(f'{image.get("subset") or ""}/x') or split_of(name)
            picture = _picture(index.find(name, file.parent, split), split, f'{file}: {name}', report)
            if picture is None:
                continue
            _check_size(picture, (image.get('width'), image.get('height')), report)
            for i, node in enumerate(image):
                where = f'{file}: {name}: {node.tag} {i + 1}'
                if node.find('attribute') is not None:
                    report.add('attributes are left out, the object is kept', where)
                thing = _cvat_thing(node, where, report)
                if thing is not None:
                    classes.add(thing.label)
                    add_thing(picture, thing, report, where)
            pictures.append(picture)
    for name in named:
        if name not in classes:
            report.add('label has no object: no class', name)
    return Dataset(pictures, [*(x for x in named if x in classes), *sorted(classes - set(named))], report)


def _cvat_thing(node: ElementTree.Element, where: str, report: Report) -> Thing | None:
    label = node.get('label', '')
    try:
        if node.tag == 'box':
            left, top, right, bottom = (float(node.get(key, '')) for key in ('xtl', 'ytl', 'xbr', 'ybr'))
            angle = float(node.get('rotation') or 0)
            if not angle:
                return Thing(label, (left, top, right, bottom))
            report.add('box is rotated: taken as an outline, with the upright box around it', where)
            points = _turned([(left, top), (right, top), (right, bottom), (left, bottom)], angle)
        elif node.tag == 'polygon':
            points = [float(x) for pair in node.get('points', '').split(';') for x in pair.split(',')]
        elif node.tag == 'ellipse':
            report.add(f'ellipse is taken as a polygon of {CIRCLE_POINTS} points', where)
            points = _ellipse(*(float(node.get(key, '')) for key in ('cx', 'cy', 'rx', 'ry')))
        elif node.tag == 'mask':
            left, top, width, height = (int(node.get(key, '')) for key in ('left', 'top', 'width', 'height'))
            runs = [int(x) for x in node.get('rle', '').split(',')]
            pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(height, width)
            return _thing_of_mask(label, pixels, left, top)
        else:
            report.add(f'{node.tag} is neither box nor outline: left out', where)
            return None
    except ValueError:
        report.add(f'{node.tag} cannot be read: left out', where)
        return None
    return Thing(label, box_of(points), [points])


def _turned(points: list[tuple[float, float]], degrees: float) -> list[float]:
    """Corners of a box turned clockwise about its centre: x, y, x, y ..."""
    angle = math.radians(degrees)
    mid_x, mid_y = (sum(values) / len(points) for values in zip(*points))
    turned = []
    for x, y in points:
        dx, dy = x - mid_x, y - mid_y
        turned += [mid_x + dx * math.cos(angle) - dy * math.sin(angle)]
        turned += [mid_y + dx * math.sin(angle) + dy * math.cos(angle)]
    return turned


def _ellipse(x: float, y: float, radius_x: float, radius_y: float) -> list[float]:
    angles = [2 * math.pi * i / CIRCLE_POINTS for i in range(CIRCLE_POINTS)]
    return [v for a in angles for v in (x + radius_x * math.cos(a), y + radius_y * math.sin(a))]


def _thing_of_mask(label: str, pixels: np.ndarray, left: float, top: float) -> Thing | None:
    """An object of the outlines of a mask (height, width) at a place of its image."""
    found, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = [(x.reshape(-1, 2) + (left, top)).astype(float).ravel().tolist() for x in found if len(x) > 2]
    if not polygons:
        raise ValueError('mask is empty')
    rows, columns = np.nonzero(pixels)
    edges = (columns.min() + left, rows.min() + top, columns.max() + 1 + left, rows.max() + 1 + top)
    return Thing(label, tuple(float(x) for x in edges), polygons)


# ---------------------------------------------------------------- LabelMe


def read_labelme(root: Path) -> Dataset:
    """LabelMe: a JSON file for each image, which may hold the image itself."""
    report, index = Report(), ImageIndex(root)
    pictures, classes = [], set()
    for file in files_in(root, '.json'):
        content = read_json(file, report)
        if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
            report.add('JSON file has no shapes: passed over', file)
            continue
        picture = _labelme_picture(content, file, root, index, report)
        if picture is None:
            continue
        groups: dict[Any, Thing] = {}
        for i, shape in enumerate(content['shapes']):
            where = f'{file}: shape {i + 1}'
            thing = _labelme_thing(shape, where, report)
            if thing is None:
                continue
            group = shape.get('group_id')
            if group is not None and (thing.label, group) in groups and thing.polygons:
                report.add('outlines of one group_id are one object', where)
                whole = groups[thing.label, group]
                whole.polygons = [*(whole.polygons or []), *thing.polygons]
                whole.box = box_of([*whole.box, *thing.box])
            else:
                groups[thing.label, (i,) if group is None else group] = thing
        for thing in groups.values():
            classes.add(thing.label)
            add_thing(picture, thing, report, file)
        pictures.append(picture)
    return Dataset(pictures, sorted(classes), report)


def _labelme_picture(
    content: dict[str, Any], file: Path, root: Path, index: ImageIndex, report: Report
) -> Picture | None:
    split = split_of(file.relative_to(root).parent / 'x')
    name = str(content.get('imagePath') or file.stem)
    path = index.find(name, file.parent, split) or index.find(file.stem, file.parent, split)
    if path is None and content.get('imageData'):
        data = base64.b64decode(content['imageData'])
        size = image_size(io.BytesIO(data))
        if size is not None:
            report.add('image is missing: taken from the annotation file', file)
            suffix = Path(name.replace('\\', '/')).suffix
            kept = suffix if suffix.lower() in IMAGE_SUFFIXES else '.png'
            return Picture(file.with_suffix(kept), size, split, data=data)
    picture = _picture(path, split, f'{file}: {name}', report)
    if picture is not None:
        _check_size(picture, (content.get('imageWidth'), content.get('imageHeight')), report)
    return picture


def _labelme_thing(shape: dict[str, Any], where: str, report: Report) -> Thing | None:
    kind = shape.get('shape_type') or 'polygon'
    label = str(shape.get('label', '')).strip()
    try:
        points = [float(x) for point in shape['points'] for x in point]
        if kind == 'rectangle' and len(points) >= 4:
            return Thing(label, box_of(points))
        if kind == 'circle' and len(points) == 4:
            report.add(f'circle is taken as a polygon of {CIRCLE_POINTS} points', where)
            radius = math.hypot(points[2] - points[0], points[3] - points[1])
            points = _ellipse(points[0], points[1], radius, radius)
        elif kind == 'mask':
            with Image.open(io.BytesIO(base64.b64decode(shape['mask']))) as image:
                pixels = (np.array(image.convert('L')) > 0).astype(np.uint8)
            return _thing_of_mask(label, pixels, points[0], points[1])
        elif kind != 'polygon':
            report.add(f'shape is a {kind}: left out', where)
            return None
        if len(points) < 6:
            report.add(f'{kind} has less than three points: left out', where)
            return None
        return Thing(label, box_of(points), [points])
    except (KeyError, TypeError, ValueError, OSError):
        report.add(f'{kind} cannot be read: left out', where)
        return None


# ---------------------------------------------------------------- masks, folders


def read_masks(root: Path) -> Dataset:
    """Images with masks of numbers, or of colours with a table such as labelmap.txt or class_dict.csv."""
    report = Report()
    pairs = list(_mask_pairs(root, report))
    if not pairs:
        raise UserError(f'{root}: no image has a mask of its name in a folder {", ".join(MASK_FOLDERS)}')
    colours = _colour_table(root, report)
    modes = set()
    for _, mask, _ in pairs:
        with Image.open(mask) as opened:
            modes.add('numbers' if opened.mode in ('1', 'L', 'P', 'I', 'I;16') else 'colours')
    if len(modes) > 1:
        raise UserError(f'{root} has masks in colours and masks of numbers: convert one kind at a time')
    if modes == {'colours'}:
        classes, read = _colour_reader(pairs, colours, report)
    else:
        classes, read = _number_reader(root, pairs, colours, report)
    pictures = []
    for image, mask, split in pairs:
        picture = _picture(image, split, image, report)
        if picture is None:
            continue
        with Image.open(mask) as opened:
            if opened.size != picture.size:
                report.add('mask has another size than its image: both left out', mask)
                continue
        picture.map = partial(read, mask)
        pictures.append(picture)
    return Dataset(pictures, classes, report)


def _mask_pairs(root: Path, report: Report) -> Iterator[tuple[Path, Path, str | None]]:
    """Images and their masks: in a folder that is called after masks, or with a name that ends in _mask."""

    def is_mask(path: Path) -> bool:
        folders = [part.lower() for part in path.relative_to(root).parts[:-1]]
        return bool(set(folders) & set(MASK_FOLDERS)) or path.stem.lower().endswith('_mask')

    def key(path: Path) -> tuple[str | None, str]:
        stem = re.sub(r'_(mask|l|gt)$', '', path.stem, flags=re.IGNORECASE).lower()
        return split_of(path.relative_to(root).parent / 'x'), stem

    files = files_in(root, *IMAGE_SUFFIXES)
    masks = {key(path): path for path in files if is_mask(path)}
    for path in files:
        if is_mask(path):
            continue
        split, stem = key(path)
        mask = masks.pop((split, stem), None)
        if mask is None:
            report.add('image has no mask: left out', path)
        else:
            yield path, mask, split or _listed_split(root, path.stem)
    for path in masks.values():
        report.add('mask has no image: left out', path)


def _listed_split(root: Path, stem: str) -> str | None:
    """The split that a list such as ImageSets/Segmentation/train.txt names."""
    for split in ('train', 'val', 'test'):
        for file in (root / 'ImageSets/Segmentation' / f'{split}.txt', root / f'{split}.txt'):
            if file.is_file() and stem in read_text(file).split():
                return split
    return None


def _colour_table(root: Path, report: Report) -> dict[str, tuple[int, int, int] | int]:
    """Names of classes with their colour or number, from the tables that labelling programs write."""
    table: dict[str, tuple[int, int, int] | int] = {}
    for file in files_in(root, '.txt', '.csv'):
        name = file.name.lower()
        if name not in ('labelmap.txt', 'class_dict.csv', 'classes.csv', '_classes.csv', 'label_colors.txt'):
            continue
        for line in read_text(file, report).splitlines():
            fields = [x for x in re.split(r'[,;:\t]', line.strip()) if x.strip()]
            numbers = [x.strip() for x in fields if x.strip().isdigit()]
            words = [x.strip() for x in fields if x.strip() and not x.strip().isdigit()]
            if line.startswith('#') or not words:
                continue
            if len(numbers) >= 3:
                red, green, blue = map(int, numbers[:3])
                table[words[0]] = (red, green, blue)
            elif len(numbers) == 1:
                table[words[0]] = int(numbers[0])
    return table


def _pack(mask: Path) -> np.ndarray:
    """The colours of a mask as numbers, red * 65536 + green * 256 + blue (height, width)."""
    with Image.open(mask) as image:
        pixels = np.asarray(image.convert('RGB')).astype(np.int64)
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def _colour_reader(
    pairs: list, colours: dict, report: Report
) -> tuple[list[str], Callable[[Path], np.ndarray]]:
    numbers = {}
    for i, (_, colour) in enumerate(colours.items()):
        if isinstance(colour, tuple):
            numbers[colour[0] << 16 | colour[1] << 8 | colour[2]] = i
    classes = list(colours)
    if not numbers:
        found: set[int] = set()
        for _, mask, _ in pairs:
            found |= set(np.unique(_pack(mask)).tolist())
            if len(found) > 255:
                raise UserError(
                    f'{mask}: the masks have more than 255 colours: they are blurred, or JPEG. Save '
                    'them without loss, or list the colours in labelmap.txt: name:red,green,blue'
                )
        numbers = {colour: i for i, colour in enumerate(sorted(found))}
        classes = [f'colour_{colour:06x}' for colour in numbers]
        for name in classes:
            report.add('colour has no name: list them in labelmap.txt as name:red,green,blue', name)

    def read(mask: Path) -> np.ndarray:
        colour_of, place = np.unique(_pack(mask), return_inverse=True)
        values = np.array([numbers.get(int(colour), 255) for colour in colour_of], np.uint8)
        unknown = [f'{int(colour):06x}' for colour in colour_of if int(colour) not in numbers]
        if unknown:
            report.add('mask has colours of no class: ignored (255)', f'{mask}: {", ".join(unknown[:4])}')
        with Image.open(mask) as image:
            return values[place].reshape(image.height, image.width)

    return classes, read


def _number_reader(
    root: Path, pairs: list, table: dict, report: Report
) -> tuple[list[str], Callable[[Path], np.ndarray]]:
    found: set[int] = set()
    for _, mask, _ in pairs:
        with Image.open(mask) as image:
            found |= set(np.unique(np.asarray(image)).astype(int).tolist())
    names = {number: name for name, number in table.items() if isinstance(number, int)}
    listed = root / 'classes.txt'
    if not names and listed.is_file():
        lines = read_text(listed, report).splitlines()
        names = dict(enumerate(line.strip() for line in lines if line.strip()))
    elif not names and table:  # a palette: the numbers count the colours
        names = dict(enumerate(table))
    binary = found <= {0, 255} and 255 in found
    if binary:
        report.add('masks hold 0 and 255 only: 255 is taken as class 1', pairs[0][1])
        names = names or {0: 'background', 1: 'object'}
    highest = max((x for x in found if binary or x != 255), default=0) if not binary else 1
    if highest > 254:
        raise UserError(
            f'{root}: the masks hold numbers up to {highest}; 254 is the last that a class can have'
        )
    classes = [names.get(i, f'class_{i}') for i in range(max(highest, max(names, default=0)) + 1)]

    def read(mask: Path) -> np.ndarray:
        with Image.open(mask) as image:
            pixels = np.asarray(image).astype(np.uint8)
        return (pixels == 255).astype(np.uint8) if binary else pixels

    return classes, read


def read_folders(root: Path) -> Dataset:
    """A folder of images for each class, perhaps in a folder for each split."""
    report, pictures, classes = Report(), [], set()
    for path in files_in(root, *IMAGE_SUFFIXES):
        parts = path.relative_to(root).parts[:-1]
        split = split_of(f'{parts[0]}/x') if parts else None
        names = parts[1:] if split else parts
        if not names:
            report.add('image is in no folder of a class: left out', path)
            continue
        picture = _picture(path, split, path, report)
        if picture is not None:
            picture.label = names[0]
            classes.add(names[0])
            pictures.append(picture)
    return Dataset(pictures, sorted(classes), report)


READERS: dict[str, Callable[[Path], Dataset]] = {
    'coco': read_coco,
    'yolo': read_yolo,
    'voc': read_voc,
    'cvat': read_cvat,
    'labelme': read_labelme,
    'masks': read_masks,
    'folders': read_folders,
}
