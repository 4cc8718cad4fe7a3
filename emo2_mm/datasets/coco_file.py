"""Read annotation files in COCO's format, as training, evaluation and the check of datasets do.

What can be repaired without ambiguity is repaired and reported; anything else is reported as an error. Only
masks in run lengths need pycocotools.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Iterator, Sequence

from ..errors import UserError
from .files import decode, read_header
from .report import Report, repeated

NUMBER = (int, float)


def read_coco(
    file: str | os.PathLike,
    report: Report,
    classes: Sequence[str] | None = None,
    folder: str | os.PathLike | None = None,
    verify: bool = False,
    masks: bool = False,
    ignore_orientation: bool = False,
) -> dict[str, Any]:
    """Read an annotation file, with its entries repaired where that is unambiguous.

    Args:
        file: JSON file.
        report: Takes what was found; :meth:`Report.raise_errors` refuses what cannot be used.
        classes: Names in the order of the labels: the categories are returned in this order, those that
            the file lacks without boxes. Defaults to the categories of the file, without root categories.
        folder: Folder of the images: their names are compared with the files in it, and sizes that are
            missing are read from them.
        verify: Compare all sizes with those of the images.
        masks: Whether masks are used: then each object needs one.
        ignore_orientation: Images are loaded as stored, without their EXIF orientation.

    Returns:
        The content with the lists ``images``, ``annotations`` and ``categories``, without the entries that
        are reported as errors.
    """
    content = _load(Path(file), report)
    images = _read_images(content, file, report)
    if folder is not None:
        match_names(images, str(folder), file, report)
    annotations = _read_annotations(content, images, file, report)
    if folder is not None:
        checked = images if verify else [x for x in images if not (x.get('width') and x.get('height'))]
        _verify_sizes(checked, annotations, str(folder), file, ignore_orientation, report)
    categories, ids = _read_categories(content, annotations, classes, file, report)
    for annotation in annotations:
        annotation['category_id'] = ids.get(annotation['category_id'], annotation['category_id'])
    if classes is not None:
        categories = arrange_categories(categories, classes, file, report)
    known = {category['id'] for category in categories}
    unknown = [a for a in annotations if a['category_id'] not in known]
    report.add(
        'COCO005', *(f'{file}: annotation {a["id"]!r}: category_id {a["category_id"]!r}' for a in unknown)
    )
    annotations = [a for a in annotations if a['category_id'] in known]

    sizes = {image['id']: (image.get('width'), image.get('height')) for image in images}
    _check_boxes(annotations, sizes, file, report)
    _read_crowds(annotations, categories, file, report)
    if masks:
        _check_masks(annotations, sizes, file, report)
    _number(annotations, file, report)
    return {**content, 'images': images, 'annotations': annotations, 'categories': categories}


def arrange_categories(
    categories: list[dict], classes: Sequence[str], file: str | os.PathLike, report: Report
) -> list[dict]:
    """Sort categories by the order of the classes, first; add those that are missing; the others follow.

    Labels are places in this list, so that files may list their categories in any order.
    """
    by_name = {category['name']: category for category in categories}
    if not set(by_name) & set(classes):
        report.add(
            'COCO006', f'{file}: it has {", ".join(by_name) or "none"}; the config {", ".join(classes)}'
        )
    else:
        _add_names('COCO032', [name for name in classes if name not in by_name], file, report)
    _add_names('COCO033', [name for name in by_name if name not in classes], file, report)
    free = max((c['id'] for c in categories if isinstance(c['id'], int)), default=0) + 1
    arranged = []
    for name in classes:
        found = by_name.pop(name, None)
        arranged.append(found or dict(id=free, name=name))
        free += arranged[-1]['id'] == free
    return arranged + list(by_name.values())


def _add_names(code: str, names: list[str], file: Any, report: Report) -> None:
    """Add a finding about classes, all of which are named."""
    if names:
        report.add(code, f'{file}: {", ".join(map(repr, names))}')


def _load(file: Path, report: Report) -> dict[str, Any]:
    lists: dict[str, Any] = dict(images=[], annotations=[], categories=[])
    try:
        text, encoding = decode(file.read_bytes(), file)
        content = json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        text = str(error) if isinstance(error, UserError) else f'{file}: {error}'
        report.add('COCO001', text)
        return lists
    if encoding != 'utf-8':
        report.add('COCO021', f'{file}: {encoding}')
    if not isinstance(content, dict):
        report.add(
            'COCO002', f'{file}: a {type(content).__name__}, not lists of images, annotations, categories'
        )
        return lists
    content.setdefault('info', {})  # pycocotools copies it
    for name in lists:
        if not isinstance(content.get(name), list):
            found = 'missing' if content.get(name) is None else f'a {type(content[name]).__name__}'
            if name != 'annotations' or name in content:  # files of images to test have none
                there = ', '.join(content)
                report.add('COCO002', f'{file}: {name} is {found}, not a list; there is {there}')
            content[name] = []
    return content


def _entries(
    content: dict, name: str, keys: Sequence[str], file: Any, report: Report
) -> Iterator[tuple[int, dict]]:
    """Yield copies of the entries of a list that have all keys."""
    for i, entry in enumerate(content[name]):
        if not isinstance(entry, dict):
            report.add('COCO002', f'{file}: {name}[{i}] is {entry!r:.60}')
            continue
        missing = [key for key in keys if entry.get(key) is None]
        report.add('COCO002', *(f'{file}: {name}[{i}].{key} is missing' for key in missing))
        if not missing:
            yield i, dict(entry)


def _key(value: Any) -> Any:
    """An id as a number where it is one: 7 for 7.0 and '7'; ids that are other texts stay so."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip('-').isdecimal():
        return int(value)
    return value


def _read_images(content: dict, file: Any, report: Report) -> list[dict]:
    images: dict[Any, dict] = {}
    texts = []
    for i, image in _entries(content, 'images', ('id', 'file_name'), file, report):
        place = f'{file}: images[{i}]'
        if not isinstance(image['file_name'], str) or not isinstance(image['id'], (*NUMBER, str)):
            report.add('COCO002', f'{place}: id {image["id"]!r}, file_name {image["file_name"]!r}')
            continue
        for name in ('width', 'height'):
            value = _number_of(image.get(name))
            if value is None or not math.isfinite(value) or value <= 0:
                image.pop(name, None)
            else:
                image[name] = int(value)
        given, image['id'] = image['id'], _key(image['id'])
        if type(given) is not int:
            texts.append(f'{place}.id is {given!r}')
        same = images.get(image['id'])
        if same is None:
            images[image['id']] = image
        elif same['file_name'] == image['file_name']:
            report.add('COCO045', f'{place}: {image["file_name"]}')
        else:
            report.add('COCO003', f'{place}: {given!r} of {same["file_name"]} and {image["file_name"]}')
    report.add('COCO027', *texts)
    listed = repeated(image['file_name'] for image in images.values())
    report.add('IMG015', *(f'{file}: {name}' for name in listed))
    return list(images.values())


def _number_of(value: Any) -> float | None:
    """A number, also one written as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (*NUMBER, str)):
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


def match_names(images: list[dict], folder: str, file: Any, report: Report) -> None:
    """Set ``file_name`` to the name on disk: separators, parent folders, case, Unicode form may differ."""
    listings: dict[str, dict[str, str]] = {}

    def look(name: str) -> str | None:
        top, base = os.path.split(name)
        if top not in listings:
            try:
                names = os.listdir(os.path.join(folder, top))
            except OSError:
                names = []
            listings[top] = {}
            # the exact name takes precedence; of names that become the same, none is taken
            plain = [_plain(n) for n in names]
            stems = [os.path.splitext(n)[0] for n in plain]
            for keys in (stems, plain):
                unique = Counter(keys)
                listings[top].update((k, n) for k, n in zip(keys, names) if unique[k] == 1)
            listings[top].update((n, n) for n in names)
        found = listings[top].get(base) or listings[top].get(_plain(base))
        return found and os.path.join(top, found)

    for image in images:
        name = image['file_name']
        slashes = name.replace('\\', '/')
        tries = dict.fromkeys((name, slashes, slashes.lstrip('./'), slashes.rsplit('/', 1)[-1]))
        found = next(filter(None, map(look, tries)), None)
        if found is None:
            report.add('IMG001', f'{os.path.join(folder, name)}, which {file} names')
            continue
        found = os.path.normpath(found)
        if found != os.path.normpath(name):
            report.add('COCO043', f'{file}: {name!r} is {os.path.join(folder, found)}')
        image['file_name'] = found.replace(os.sep, '/')


def _plain(name: str) -> str:
    return unicodedata.normalize('NFC', name).casefold()


def _read_annotations(content: dict, images: list[dict], file: Any, report: Report) -> list[dict]:
    known = {image['id'] for image in images}
    annotations, seen = [], set()
    for i, annotation in _entries(content, 'annotations', ('image_id', 'category_id'), file, report):
        place = f'{file}: annotation {annotation.get("id", f"[{i}]")!r}'
        for name in ('image_id', 'category_id'):
            value = annotation[name]
            if type(value) is not int:
                if not isinstance(value, (*NUMBER, str)):
                    report.add('COCO002', f'{place}: {name} is {value!r}')
                    break
                annotation[name] = _key(value)
                report.add('COCO027', f'{place}: {name} {value!r}')
        else:
            if annotation['image_id'] not in known:
                report.add('COCO035', f'{place}: image_id {annotation["image_id"]!r}')
                continue
            box = annotation['bbox'] = _read_box(annotation, place, report)
            if box is None:
                continue
            twin = (
                annotation['image_id'],
                annotation['category_id'],
                *box,
                repr(annotation.get('segmentation')),
            )
            if twin in seen:
                report.add('COCO036', place)
                continue
            seen.add(twin)
            annotation.setdefault('id', None)
            annotations.append(annotation)
    return annotations


def _read_box(annotation: dict, place: str, report: Report) -> list[float] | None:
    """The box of an annotation, its mask and its area put right; None if it cannot be used."""
    mask = annotation.get('segmentation')
    if isinstance(mask, list) and len(mask) >= 6 and all(isinstance(n, NUMBER) for n in mask):
        annotation['segmentation'] = mask = [mask]
        report.add('COCO041', place)
    box: Any = annotation.get('bbox')
    if not box:
        box = _box_of(mask)
        if box is None:
            report.add('COCO002', f'{place}: bbox is {annotation.get("bbox", "missing")!r}, without a mask')
            return None
        report.add('COCO037', place)
    numbers = [_number_of(n) for n in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers:
        report.add('COCO002', f'{place}: bbox is {box!r}')
        return None
    if any(isinstance(n, str) for n in box):
        report.add('COCO038', f'{place}: {box}')
        box = numbers
    if not all(map(math.isfinite, box)):
        report.add('COCO039', f'{place}: {box}')
        return None
    if box[2] < 0 or box[3] < 0:
        report.add('COCO040', f'{place}: {box}')
        x, y, w, h = box
        box = [min(x, x + w), min(y, y + h), abs(w), abs(h)]
    area = _number_of(annotation.get('area'))
    if area is None or not math.isfinite(area) or (area <= 0 < box[2] * box[3]):
        area = _area_of(mask)
        area = box[2] * box[3] if area is None else area
        report.add('COCO025', place)
    annotation['area'] = area
    return list(box)


def _points(mask: Any) -> list[tuple[list, list]]:
    if not isinstance(mask, list):
        return []
    parts = [part for part in mask if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    parts = [part for part in parts if all(isinstance(n, NUMBER) and math.isfinite(n) for n in part)]
    return [(part[::2], part[1::2]) for part in parts]


def _run_lengths(mask: Any) -> Any:
    """A mask in pycocotools' compressed form; None if it is none, or cannot be read."""
    if not (isinstance(mask, dict) and isinstance(mask.get('counts'), (list, str)) and mask.get('size')):
        return None
    from pycocotools import mask as api  # which only detection needs

    try:
        height, width = mask['size']
        if isinstance(mask['counts'], list):
            if sum(mask['counts']) != height * width:
                return None
            mask = api.frPyObjects(mask, height, width)
        api.decode(mask)
    except (ValueError, TypeError, OverflowError):
        return None
    return mask


def _box_of(mask: Any) -> list[float] | None:
    parts = _points(mask)
    if parts:
        left, top = min(min(x) for x, _ in parts), min(min(y) for _, y in parts)
        return [left, top, max(max(x) for x, _ in parts) - left, max(max(y) for _, y in parts) - top]
    encoded = _run_lengths(mask)
    if encoded is None:
        return None
    from pycocotools import mask as api

    return api.toBbox(encoded).tolist()


def _area_of(mask: Any) -> float | None:
    """Pixels of a mask: the shoelace formula for polygons; None without a mask."""
    parts = _points(mask)
    if parts:
        area = sum(abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2 for x, y in parts)
        return area or None
    encoded = _run_lengths(mask)
    if encoded is None:
        return None
    from pycocotools import mask as api

    return float(api.area(encoded)) or None


def _read_categories(
    content: dict, annotations: list[dict], classes: Sequence[str] | None, file: Any, report: Report
) -> tuple[list[dict], dict]:
    """Categories, one for each name, and the ids that became others."""
    counts = Counter(annotation['category_id'] for annotation in annotations)
    categories: list[dict] = []
    for i, category in _entries(content, 'categories', ('id', 'name'), file, report):
        place = f'{file}: categories[{i}]'
        name = category['name']
        if not isinstance(name, (*NUMBER, str)) or not isinstance(category['id'], (*NUMBER, str)):
            report.add('COCO002', f'{place}: id {category["id"]!r}, name {name!r}')
            continue
        if not isinstance(name, str):
            report.add('COCO028', f'{place}: {name!r}')
        elif name != name.strip():
            report.add('COCO029', f'{place}: {name!r}')
        category['name'] = str(name).strip()
        given, category['id'] = category['id'], _key(category['id'])
        if type(given) is not int:
            report.add('COCO027', f'{place}.id is {given!r}')
        categories.append(category)
    for i in repeated(category['id'] for category in categories):
        same = [category['name'] for category in categories if category['id'] == i]
        if len(set(same)) > 1:
            report.add('COCO004', f'{file}: {i!r} of {" and ".join(same)}')
    supers = Counter(category.get('supercategory') for category in categories)
    names = Counter(category['name'] for category in categories)
    kept: dict[str, dict] = {}
    ids = {}
    roots = []
    for category in categories:
        name, parent = category['name'], category.get('supercategory')
        others = supers[name] - (parent == name)
        needed = name in (classes or ()) and names[name] == 1
        if not counts[category['id']] and others and parent != name and not needed:
            roots.append(category)
        elif name in kept:
            ids[category['id']] = kept[name]['id']
            report.add('COCO031', f'{file}: {name!r}, ids {kept[name]["id"]!r} and {category["id"]!r}')
        else:
            kept[name] = category
    for root in roots:
        report.add('COCO030', f'{file}: {root["name"]!r} (id {root["id"]!r}), supercategory of the others')
    if classes is None:
        used = {ids.get(i, i) for i in counts}
        _add_names('COCO034', [name for name, c in kept.items() if c['id'] not in used], file, report)
    return list(kept.values()), ids


def _verify_sizes(
    images: list[dict],
    annotations: list[dict],
    folder: str,
    file: Any,
    ignore_orientation: bool,
    report: Report,
) -> None:
    """Compare width and height with those of the images, and say how their orientation was taken."""
    boxes = defaultdict(list)
    for annotation in annotations:
        boxes[annotation['image_id']].append(annotation['bbox'])
    stored: list[str] = []
    displayed: list[str] = []
    for image in images:
        path = os.path.join(folder, image['file_name'])
        header = read_header(path)
        if header is None:  # loading it will tell
            continue
        size = header.stored if ignore_orientation else header.displayed
        listed = image.get('width'), image.get('height')
        if header.stored != header.displayed and listed in (header.stored, header.displayed):
            (stored if listed == header.stored else displayed).append(path)
            image['width'], image['height'] = listed
            continue
        if header.orientation != 1:
            report.add('IMG018', f'{path}: {header.orientation}')
        if listed == size:
            continue
        inside = all(x + w <= size[0] + 1 and y + h <= size[1] + 1 for x, y, w, h in boxes[image['id']])
        if None in listed or (listed == size[::-1] and inside):
            report.add('COCO044', f'{file}: {image["file_name"]}: {listed}, the image is {size}')
            image['width'], image['height'] = size
        else:
            report.add('COCO007', f'{path}: {size}, in {file} {listed}')
    if stored and displayed:
        report.add('COCO014', f'{file}: {stored[0]} without, {displayed[0]} with it')
    report.add('COCO046', *stored)
    if displayed and ignore_orientation:
        report.add('COCO007', *displayed)


def _check_boxes(annotations: list[dict], sizes: dict, file: Any, report: Report) -> None:
    """Report boxes in another form than [left, top, width, height] in pixels."""
    rows = [(a['bbox'], *sizes[a['image_id']]) for a in annotations if None not in sizes[a['image_id']]]
    rows = [(box, width, height) for box, width, height in rows if box[2] > 0 and box[3] > 0]
    if not rows:
        return
    if all(max(x + w, y + h) <= 1.001 and min(width, height) > 8 for (x, y, w, h), width, height in rows):
        report.add('COCO009', f'{file}: {rows[0][0]}')
        return
    outside = sum(x + w > width + 1 or y + h > height + 1 for (x, y, w, h), width, height in rows)
    corners = all(x < w <= width + 1 and y < h <= height + 1 for (x, y, w, h), width, height in rows)
    if corners and outside >= max(2, len(rows) / 5):
        report.add(
            'COCO008', f'{file}: {outside} of {len(rows)} reach beyond their image, such as {rows[0][0]}'
        )


def _read_crowds(annotations: list[dict], categories: list[dict], file: Any, report: Report) -> None:
    for annotation in annotations:
        crowd = annotation.get('iscrowd')
        number = int(crowd) if isinstance(crowd, bool) else _number_of(crowd)
        if number is None:
            report.add('COCO022', f'{file}: annotation {annotation["id"]!r}')
        annotation['iscrowd'] = int(bool(number))
    crowds = [annotation for annotation in annotations if annotation['iscrowd']]
    if crowds and len(crowds) == len(annotations):
        report.add('COCO023', f'{file}: {len(crowds)} annotations')
        for annotation in crowds:
            annotation['iscrowd'] = 0
    elif crowds:
        counts = Counter(annotation['category_id'] for annotation in annotations)
        ignored = Counter(annotation['category_id'] for annotation in crowds)
        names = {category['id']: category['name'] for category in categories}
        _add_names('COCO024', [names[i] for i, n in ignored.items() if n == counts[i]], file, report)


def _check_masks(annotations: list[dict], sizes: dict, file: Any, report: Report) -> None:
    for annotation in annotations:
        if annotation.get('ignore') or min(annotation['bbox'][2:]) < 1:  # training drops it
            continue
        mask, place = annotation.get('segmentation'), f'{file}: annotation {annotation["id"]!r}'
        if not mask:
            report.add('COCO010', place)
        elif isinstance(mask, list):
            readable = [isinstance(part, list) and all(isinstance(n, NUMBER) for n in part) for part in mask]
            if not all(readable):
                report.add('COCO011', place)
                continue
            if not all(abs(n) < 1e6 for part in mask for n in part):
                report.add('COCO012', place)
                continue
            good = [len(part) >= 6 and len(part) % 2 == 0 for part in mask]
            if not any(good):
                report.add('COCO058', place)
            elif not all(good):
                report.add('COCO059', place)
        else:
            _check_run_lengths(annotation, sizes[annotation['image_id']], place, report)


def _check_run_lengths(annotation: dict, size: tuple, place: str, report: Report) -> None:
    mask = annotation['segmentation']
    if _run_lengths(mask) is None:
        report.add('COCO011', place)
        return
    given, wanted = list(mask['size']), [size[1], size[0]]
    if None in wanted or given == wanted:
        return
    if given == wanted[::-1]:
        turned = {**mask, 'size': wanted}
        found = _box_of(turned)
        if found and all(abs(a - b) <= 2 for a, b in zip(found, annotation['bbox'])):
            report.add('COCO042', place)
            annotation['segmentation'] = turned
            return
    report.add('COCO013', f'{place}: {given}, the image is {wanted}')


def _number(annotations: list[dict], file: Any, report: Report) -> None:
    """Number annotations from 1 unless their ids can be used: pycocotools takes id 0 for 'no match'."""
    ids = [annotation['id'] for annotation in annotations]
    odd = [i for i in ids if type(i) is not int or i <= 0] or repeated(ids)
    if odd:
        report.add('COCO026', f'{file}: {odd[0]!r}')
        for number, annotation in enumerate(annotations, 1):
            annotation['id'] = number
