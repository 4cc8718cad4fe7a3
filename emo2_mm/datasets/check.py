"""Check the data sets that a config names, before training: annotations, images, masks, maps, labels.

    python tools/check_dataset.py configs/det/mask-rcnn_emo2_5m.py --split train

Takes detection in COCO's format, folders of images and maps, and folders of classes, which may be wrapped.
Each kind of finding says what training does with it. Exit code: 0 without errors (there may be warnings),
1 with errors, 2 for wrong use.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections import Counter, defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Sequence

import cv2
import mmcv
import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image, UnidentifiedImageError
from rich.progress import track

from ..engine.preflight import check_data
from .custom import apply_custom_dataset

# What can be found, and what training does with it. Errors stop it, or lose or spoil data.
LEFT_OUT = 'training leaves the box out, and says how many; validation counts it as an object that was missed'
ERRORS = {
    'image is missing': 'training stops and names the file',
    'image is empty': 'training stops and names the file',
    'image is damaged': 'training stops and names the file',
    'image is of a kind that OpenCV does not read': 'training stops and names the file',
    'image is cut off, but loaded': 'training takes it, with whatever lay in memory where it is lost',
    'data set holds no images': "training stops: 'need at least one array to concatenate'",
    'images cannot be listed': 'training stops with the same error',
    # COCO's format
    'annotation file is not JSON': 'training stops: JSONDecodeError',
    'annotation file lacks a key or has an unusable value': 'training stops (KeyError, TypeError ...)',
    'image id is there twice': 'training takes the last entry only, with the boxes of all',
    'annotation id is there twice': "training stops: 'Annotation ids in FILE are not unique!'",
    'category is there twice': "labels do not match the config's classes any more",
    'class of the config is not in the file': 'labels of the classes after it are one too low, names wrong; '
    'evaluation may stop (IndexError); without any class training stops',
    'category id is unknown to the file': 'training leaves the box out, and says how many',
    'annotation is of an unknown image': 'training never sees it',
    'width and height are not those of the image': 'training takes boxes as pixels of the image as it is; '
    'it sorts boxes and images out by the wrong size',
    'box is not finite': 'nan: training leaves the box out; infinity: Resize after LoadAnnotations cuts it '
    'to the image, else the loss is infinite',
    'box has no area': LEFT_OUT,
    'box is outside its image': LEFT_OUT,
    'mask is missing': "training stops: KeyError 'mask'",
    'mask cannot be read': 'training stops (TypeError, ValueError), or leaves the object out',
    'mask has numbers beyond 1e6 or not finite': 'training may end at once (segmentation fault)',
    'mask has no polygon of three points': 'training leaves the object out',
    'mask (RLE) is of another size than its image': 'training stops and names the image',
    # segmentation
    'map is missing': 'training stops and names the file',
    'map cannot be read': 'training stops and names the file',
    'map has colours or alpha': 'training stops (RuntimeError): it takes one channel of classes',
    'map is 1 pixel wide or tall': 'training stops: MMSegmentation squeezes that dimension away',
    'map is of another size than its image': 'training stops and names both',
    'map has values beyond 0..255': 'training takes them modulo 256, as other classes',
    'map has values that are no class': 'training stops at the first crop with one (on a CPU: IndexError)',
    # classification
    'label is no class of the head': 'training stops (on a CPU: IndexError or the like)',
}
WARNINGS = {
    'image is grey': 'training takes it as three equal channels',
    'image has an alpha channel': 'training drops alpha: colours below it show',
    'image has 16 bits a channel': 'training takes the upper 8 bits (value // 256)',
    'image is 1 pixel wide or tall': 'training stretches it, or stops where Resize makes a side 0; '
    'detection leaves it out below filter_cfg.min_size',
    'image is listed twice': 'training takes it as often, each time with the labels of that entry',
    'classes are in another order than in the file': 'labels follow the file: what is shown and '
    'listed has the names of other classes',
    'category is no class of the config': 'training leaves its boxes out, and says how many',
    'image has no annotations': 'training takes it as background',
    'image has no annotations, and is left out': 'training never sees it (filter_cfg.filter_empty_gt), '
    'and says how many',
    'image is smaller than filter_cfg.min_size': 'training never sees it, and says how many',
    'box is less than 1 pixel wide or tall': LEFT_OUT,
    'box is partly outside its image': 'Resize after LoadAnnotations cuts it to the image, else it is kept',
    'mask has polygons of less than three points': 'training leaves these polygons out',
    'map has no image': 'training never sees it',
    'images in two folders have one name': '`tools/test.py --out` writes both to one file',
    'folders are fewer than classes of the head': 'labels after a folder that is not there are one too low',
    'class folder holds no images': 'its label never occurs',
}
Found = Dict[str, List[str]]  # places of each of these

# What MMDetection reads of each entry of an annotation file
NUMBER = (int, float)
ID = (int, float, str)
KEYS = dict(
    images=dict(id=ID, file_name=str, width=NUMBER, height=NUMBER),
    annotations=dict(id=ID, image_id=ID, category_id=ID, bbox=list, area=NUMBER),
    categories=dict(id=ID, name=str),
)


class Picture(NamedTuple):
    """The faults of a file, its width and height, and the values that occur if it is a map."""

    faults: list[str]
    size: tuple[int, int] | None = None
    values: np.ndarray | None = None


def read_all(read: Callable[[Any], Any], items: list, title: str) -> Iterator[tuple[Any, Any]]:
    """Pair each item with what is read of it, in threads and with a progress bar."""
    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        pairs = zip(items, pool.imap(read, items, chunksize=8))
        yield from track(pairs, title, total=len(items), disable=not sys.stdout.isatty())


def read_image(path: str) -> Picture:
    """Decode an image as LoadImageFromFile does, and with Pillow, which tells if a JPEG is cut off."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return Picture(['image is missing'])
    if not data:
        return Picture(['image is empty'])
    try:
        pixels = mmcv.imfrombytes(data)
    except cv2.error:  # too large for OpenCV, for instance
        pixels = None
    if pixels is None:
        known = cv2.haveImageReader(path)
        return Picture(['image is damaged' if known else 'image is of a kind that OpenCV does not read'])

    height, width = pixels.shape[:2]
    faults = ['image is 1 pixel wide or tall'] if min(width, height) == 1 else []
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode in ('1', 'L', 'LA', 'I', 'F') or image.mode.startswith('I;16'):
                faults.append('image is grey')
            if image.mode in ('LA', 'PA', 'RGBA') or 'transparency' in image.info:
                faults.append('image has an alpha channel')
            if image.format != 'JPEG' and mmcv.imfrombytes(data, flag='unchanged').dtype != np.uint8:
                faults.append('image has 16 bits a channel')
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass  # not for Pillow, while OpenCV has read it
    except Exception:  # of many kinds, depending on the format
        faults.append('image is cut off, but loaded')
    return Picture(faults, (width, height))


def read_map(path: str) -> Picture:
    """Decode a map of classes as MMSegmentation's LoadAnnotations does."""
    try:
        pixels = mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged', backend='pillow')
    except FileNotFoundError:
        return Picture(['map is missing'])
    except Exception:  # of many kinds, depending on the format
        return Picture(['map cannot be read'])
    height, width = pixels.shape[:2]
    faults = ['map is 1 pixel wide or tall'] if min(width, height) == 1 else []
    if pixels.ndim > 2:
        return Picture([*faults, 'map has colours or alpha'], (width, height))
    return Picture(faults, (width, height), np.unique(pixels).astype(int))


def check_coco(dataset: Any, leaf: ConfigDict, model: ConfigDict, found: Found) -> str:
    """Check a CocoDataset, and its masks if the pipeline loads them."""
    file = dataset.ann_file
    try:
        coco = json.loads(Path(file).read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        found['annotation file is not JSON'].append(f'{file}: {error}')
        return file
    if dataset.test_mode and isinstance(coco, dict):
        coco.setdefault('annotations', [])  # as in COCO's test sets
    images, annotations, categories = (usable_entries(coco, name, file, found) for name in KEYS)
    by_id = {image['id']: image for image in images}
    for fault, names in {
        'image id is there twice': [image['id'] for image in images],
        'image is listed twice': [image['file_name'] for image in by_id.values()],
        'annotation id is there twice': [annotation['id'] for annotation in annotations],
        'category is there twice': [c['id'] for c in categories] + [c['name'] for c in categories],
    }.items():
        found[fault] += [f'{file}: {name!r}' for name in repeated(names)]
    used = check_categories(categories, dataset.metainfo['classes'], file, found)
    parts = sort_annotations(annotations, by_id, {c['id'] for c in categories}, used, file, found)

    filters = {} if dataset.test_mode else dataset.filter_cfg or {}
    with_mask = any(step.get('with_mask') for step in leaf.get('pipeline', []))
    paths = [os.path.join(dataset.data_prefix['img'], image['file_name']) for image in by_id.values()]
    left = 0
    for image, (path, picture) in zip(by_id.values(), read_all(read_image, paths, file)):
        for fault in picture.faults:
            found[fault].append(path)
        size = image['width'], image['height']
        if picture.size and picture.size != size:
            text = f'{path}: {picture.size}, in {file} {size}'
            found['width and height are not those of the image'].append(text)
        small = min(size) < filters.get('min_size', 0)
        if small:
            found['image is smaller than filter_cfg.min_size'].append(f'{path}: {size}')
        empty = not parts[image['id']]
        left_out = empty and bool(filters.get('filter_empty_gt'))
        if empty:
            found['image has no annotations' + ', and is left out' * left_out].append(path)
        left += not (small or left_out)
        for annotation in parts[image['id']]:
            place = f'{file}: annotation {annotation["id"]!r} of {image["file_name"]}'
            for fault in annotation_faults(annotation, size, picture.size or size, with_mask):
                found[fault].append(f'{place}: {annotation["bbox"]} in {size}' if 'box' in fault else place)
    if not left:
        found['data set holds no images'].append(f'{file}: {len(by_id)}, of which it uses none')
    return f'{file}: {len(images)} images, {len(annotations)} annotations'


def usable_entries(coco: Any, name: str, file: str, found: Found) -> list[dict]:
    """The entries of a list in COCO's format that have all keys, with values of the right kind."""
    entries = coco.get(name) if isinstance(coco, dict) else None
    wrong = [] if isinstance(entries, list) else [f'{name} is no list']
    usable = []
    for i, entry in enumerate([] if wrong else entries):
        entry = entry if isinstance(entry, dict) else {}
        bad = [key for key, kind in KEYS[name].items() if not isinstance(entry.get(key), kind)]
        box = entry.get('bbox')
        if isinstance(box, list) and (len(box) != 4 or not all(isinstance(n, NUMBER) for n in box)):
            bad.append('bbox')
        wrong += [f'{name}[{i}].{key} is {entry.get(key, "missing")!r}' for key in bad]
        if not bad:
            usable.append(entry)
    found['annotation file lacks a key or has an unusable value'] += [f'{file}: {text}' for text in wrong]
    return usable


def check_categories(categories: list[dict], classes: list[str], file: str, found: Found) -> set:
    """Compare the file's categories with the config's classes; return the ids of those in both."""
    names = [category['name'] for category in categories]
    gone = [name for name in classes if name not in names]
    found['class of the config is not in the file'] += [f'{file}: {name!r}' for name in gone]
    more = [name for name in names if name not in classes]
    found['category is no class of the config'] += [f'{file}: {name!r}' for name in more]
    common = [name for name in names if name in classes]
    if sorted(common) == sorted(classes) and common != list(classes):
        text = f'{file}: {common[:5]} ..., in the config {list(classes[:5])} ...'
        found['classes are in another order than in the file'].append(text)
    return {category['id'] for category in categories if category['name'] in classes}


def sort_annotations(
    annotations: list[dict], images: dict, known: set, used: set, file: str, found: Found
) -> dict[Any, list[dict]]:
    """The annotations of the used categories, by id of their image."""
    parts = defaultdict(list)
    for annotation in annotations:
        image, category = annotation['image_id'], annotation['category_id']
        place = f'{file}: annotation {annotation["id"]!r}'
        if image not in images:
            found['annotation is of an unknown image'].append(f'{place}: {image!r}')
        elif category not in known:
            found['category id is unknown to the file'].append(f'{place}: {category!r}')
        elif category in used:
            parts[image].append(annotation)
    return parts


def annotation_faults(annotation: dict, size: tuple, loaded: tuple, with_mask: bool) -> Iterator[str]:
    """What is wrong with an annotation; sizes (width, height) of its image as listed and as loaded."""
    if annotation.get('ignore'):  # MMDetection leaves it out
        return
    fault = box_fault(annotation['bbox'], annotation['area'], *size)
    if fault:
        yield fault
    if with_mask and fault in (None, 'box is partly outside its image'):  # the box is kept
        fault = mask_fault(annotation.get('segmentation'), *loaded)
        if fault:
            yield fault


def box_fault(box: list, area: float, width: float, height: float) -> str | None:
    """What is wrong with a box (x, y, width, height), in pixels, in an image of this size."""
    x, y, w, h = box
    if not all(map(math.isfinite, box)):
        return 'box is not finite'
    if w <= 0 or h <= 0 or area <= 0:
        return 'box has no area'
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return 'box is outside its image'
    if w < 1 or h < 1:
        return 'box is less than 1 pixel wide or tall'
    if min(x, y) <= -1 or x + w >= width + 1 or y + h >= height + 1:  # less comes from rounding
        return 'box is partly outside its image'
    return None


def mask_fault(mask: Any, width: int, height: int) -> str | None:
    """What is wrong with a mask, polygons or RLE, in an image of this size."""
    if not mask:
        return 'mask is missing'
    if isinstance(mask, list):
        if not all(isinstance(part, list) and all(isinstance(n, NUMBER) for n in part) for part in mask):
            return 'mask cannot be read'
        if not all(abs(n) < 1e6 for part in mask for n in part):
            return 'mask has numbers beyond 1e6 or not finite'
        good = [len(part) >= 6 and len(part) % 2 == 0 for part in mask]
        if not any(good):
            return 'mask has no polygon of three points'
        return None if all(good) else 'mask has polygons of less than three points'

    from pycocotools import mask as run_length  # which only detection needs

    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), (list, str)) or 'size' not in mask:
        return 'mask cannot be read'
    if mask['size'] != [height, width]:
        return 'mask (RLE) is of another size than its image'
    try:
        if isinstance(mask['counts'], list):
            mask = run_length.frPyObjects(mask, height, width)
        run_length.decode(mask)
    except (ValueError, TypeError, OverflowError):
        return 'mask cannot be read'
    return None


def check_segmentation(dataset: Any, leaf: ConfigDict, model: ConfigDict, found: Found) -> str:
    """Check images and maps of a BaseSegDataset."""
    folder = dataset.data_prefix['img_path']
    samples = list_samples(dataset, folder, found)
    pairs = [(sample['img_path'], sample.get('seg_map_path')) for sample in samples]
    images = [path for path, _ in pairs]
    found['image is listed twice'] += repeated(images)
    found['images in two folders have one name'] += repeated(Path(path).stem for path in set(images))
    if not dataset.ann_file and dataset.data_prefix.get('seg_map_path'):
        there = Path(dataset.data_prefix['seg_map_path']).rglob(f'*{dataset.seg_map_suffix}')
        found['map has no image'] += sorted({str(path) for path in there} - {path for _, path in pairs})

    if dataset.label_map:
        classes = len(dataset.label_map)
    else:
        classes = classes_of(model.get('decode_head')) or len(dataset.metainfo.get('classes', ()))

    def read(pair: tuple[str, str | None]) -> tuple[Picture, Picture]:
        return read_image(pair[0]), read_map(pair[1]) if pair[1] else Picture([])

    for (path, map_path), (image, labels) in read_all(read, pairs, folder):
        for fault in image.faults:
            found[fault].append(path)
        for fault in labels.faults:
            found[fault].append(map_path)
        if image.size and labels.size and image.size != labels.size:
            text = f'{map_path}: {labels.size}, image {image.size}'
            found['map is of another size than its image'].append(text)
        if labels.values is not None:
            check_values(labels.values, classes, dataset.reduce_zero_label, map_path, found)
    return f'{folder}: {len(samples)} images, {classes} classes'


def check_values(values: np.ndarray, classes: int, reduce_zero: bool, path: str, found: Found) -> None:
    """Tell the values of a map that are neither classes nor 255, to be ignored."""
    wraps = values[(values < 0) | (values > 255)].tolist()
    if wraps:
        found['map has values beyond 0..255'].append(f'{path}: {wraps[:10]}')
    last = classes - (not reduce_zero)
    wrong = values[(values > last) & (values < 255)].tolist()
    if wrong:
        allowed = f'1..{last}, 0 and 255 for none' if reduce_zero else f'0..{last}, 255 for none'
        found['map has values that are no class'].append(f'{path}: {wrong[:10]}, classes are {allowed}')


def check_classification(dataset: Any, leaf: ConfigDict, model: ConfigDict, found: Found) -> str:
    """Check a CustomDataset: folders of classes, or the images that an annotation file lists with labels."""
    folder = dataset.img_prefix
    samples = list_samples(dataset, dataset.ann_file or folder, found)
    if not samples:
        return folder
    classes = classes_of(model.get('head')) or len(dataset.CLASSES or ())
    paths = [sample['img_path'] for sample in samples]
    labels = [sample.get('gt_label', 0) for sample in samples]
    found['label is no class of the head'] += [
        f'{path}: {label}, classes are 0..{classes - 1}'
        for path, label in zip(paths, labels)
        if not 0 <= label < classes
    ]
    folders = getattr(dataset, 'folder_to_idx', {})  # without an annotation file
    if 0 < len(folders) < classes:
        text = f'{folder}: {len(folders)} folders, {classes} classes'
        found['folders are fewer than classes of the head'].append(text)
    used = set(labels)
    empty = [os.path.join(folder, name) for name, label in folders.items() if label not in used]
    found['class folder holds no images'] += empty
    found['image is listed twice'] += repeated(paths)
    for path, picture in read_all(read_image, paths, folder):
        for fault in picture.faults:
            found[fault].append(path)
    return f'{folder}: {len(samples)} images, {classes} classes'


def list_samples(dataset: Any, place: str, found: Found) -> list[dict]:
    """What the data set itself lists; an error that stops it stops training, too."""
    try:
        samples = dataset.load_data_list()
    except Exception as error:
        found['images cannot be listed'].append(f'{place}: {type(error).__name__}: {error}')
        return []
    if not samples:
        found['data set holds no images'].append(place)
    return samples


def repeated(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def classes_of(head: Any) -> int | None:
    """How many classes a head, or the last of several, tells apart."""
    head = head[-1] if isinstance(head, (list, tuple)) else head or {}
    return head.get('num_classes')


CHECKS = dict(CocoDataset=check_coco, BaseSegDataset=check_segmentation, CustomDataset=check_classification)


def leaves(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if 'datasets' in dataset:
        for part in dataset.datasets:
            yield from leaves(part)
    elif 'dataset' in dataset:
        yield from leaves(dataset.dataset)
    else:
        yield dataset


def build(leaf: ConfigDict, scope: str) -> tuple[Any, Callable]:
    """The data set as training builds it, but for reading files, and the function that checks it.

    Raises:
        ValueError: If it is none of :data:`CHECKS`, or does not lie in local files.
    """
    if '://' in (leaf.get('data_root') or ''):
        raise ValueError(f'{leaf.data_root} is no local folder, which is all that can be checked')
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build({**leaf, 'lazy_init': True, 'pipeline': []})
    names = [kind.__name__ for kind in type(dataset).__mro__]
    for name, check in CHECKS.items():
        if name in names:
            return dataset, check
    raise ValueError(f'{names[0]} cannot be checked, only {", ".join(CHECKS)} and what derives from them')


def show(found: Found, max_shown: int) -> int:
    """Print what was found, errors first; return how many errors there are."""
    totals = []
    for level, effects in (('error', ERRORS), ('warning', WARNINGS)):
        totals.append(sum(len(found[fault]) for fault in effects))
        for fault, effect in effects.items():
            places = found[fault]
            if places:
                print(f'\n{level}: {fault} ({len(places)})\n  {effect}')
                print(*(f'    {place}' for place in places[:max_shown]), sep='\n')
            if len(places) > max_shown:
                print(f'    and {len(places) - max_shown} more')
    print(f'\n{totals[0]} errors, {totals[1]} warnings')
    return totals[0]


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
    apply_custom_dataset(cfg)
    loaders = [cfg.get(f'{split}_dataloader') for split in splits]
    parts = [leaf for loader in loaders if loader for leaf in leaves(loader.dataset)]
    parts = [leaf for i, leaf in enumerate(parts) if leaf not in parts[:i]]  # test is often val
    if not parts:
        raise ValueError(f'it has no dataset to {" or ".join(splits)} with')
    check_data(cfg, *splits)
    datasets = [build(leaf, cfg.get('default_scope', 'mmengine')) for leaf in parts]

    cv2.setLogLevel(0)  # its messages name no files and break the progress bar
    found: Found = {fault: [] for fault in (*ERRORS, *WARNINGS)}
    for leaf, (dataset, check) in zip(parts, datasets):
        print(check(dataset, leaf, cfg.get('model') or {}, found), flush=True)
    return show(found, max_shown)
