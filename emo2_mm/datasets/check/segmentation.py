"""Check folders of images and label maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict

from ..report import Report, repeated
from ..segmentation import LabelMap, SegDataset, read_map
from .images import Picture, read_all, read_image


def check_segmentation(dataset: Any, leaf: ConfigDict, model: ConfigDict, report: Report) -> str:
    """Check images and maps of a SegDataset."""
    folder = dataset.data_prefix['img_path']
    samples = list_samples(dataset, folder, report)
    pairs = [(sample['img_path'], sample.get('seg_map_path')) for sample in samples]
    images = [path for path, _ in pairs]
    report.add('IMG015', *repeated(images))
    report.add('IMG016', *repeated(Path(path).stem for path in set(images)))
    if not dataset.ann_file and dataset.data_prefix.get('seg_map_path'):
        there = Path(dataset.data_prefix['seg_map_path']).rglob(f'*{dataset.seg_map_suffix}')
        paths = {str(path) for path in there if not path.name.startswith('.')}
        report.add('SEG021', *sorted(paths - {path for _, path in pairs}))
    steps = leaf.get('pipeline', [])
    flag = next((step.color_type for step in steps if step.get('color_type')), 'color')

    def read(pair: tuple[str, str | None]) -> tuple[Picture, LabelMap]:
        return read_image(pair[0], flag), read_map(pair[1]) if pair[1] else LabelMap(None, (), None)

    names = dataset.metainfo.get('classes', ())
    replaced = dataset.label_map or {}
    # label_map of a dataset class maps its own classes; that of SegDataset may be of a few numbers
    whole = bool(replaced) and not getattr(dataset, 'numbers', None)
    count = len(replaced) if whole else classes_of(model.get('decode_head')) or len(names)
    seen: set[int] = set()
    for (path, map_path), (image, labels) in read_all(read, pairs, folder):
        for code in image.codes:
            report.add(code, path)
        if labels.code:
            wrong = f': {list(labels.values)}' if labels.code == 'SEG006' else ''
            report.add(labels.code, f'{map_path}{wrong}')
        if image.size and labels.size and image.size != labels.size:
            report.add('SEG005', f'{map_path}: {labels.size}, image {image.size}')
        values = [value if whole else replaced.get(value, value) for value in labels.values]
        check_values(values, count, dataset.reduce_zero_label, map_path, report)
        seen.update(values)
    # of ADE20K and the like, it is known what they hold
    if any(map_path for _, map_path in pairs) and type(dataset) is SegDataset:
        missing = [name for label, name in enumerate(names) if label not in seen]
        if missing:
            place = dataset.data_prefix['seg_map_path']
            report.add('SEG022', f'{place}: {", ".join(map(repr, missing))}')
    return f'{folder}: {len(samples)} images, {count} classes'


def check_values(
    values: list[int], classes: int, reduce_zero: bool, path: str | None, report: Report
) -> None:
    """Report the values of a map that are neither classes nor 255, to be ignored."""
    last = classes - (not reduce_zero)
    wrong = [value for value in values if last < value < 255]
    if wrong:
        allowed = f'1..{last}, 0 and 255 for none' if reduce_zero else f'0..{last}, 255 for none'
        report.add('SEG007', f'{path}: {wrong[:10]}, classes are {allowed}')


def list_samples(dataset: Any, place: str, report: Report) -> list[dict]:
    """What the dataset itself lists; an error that stops it stops training, too."""
    try:
        samples = dataset.load_data_list()
    except Exception as error:
        report.add('IMG007', f'{place}: {type(error).__name__}: {error}')
        return []
    if not samples:
        report.add('IMG006', place)
    return samples


def classes_of(head: Any) -> int | None:
    """How many classes a head, or the last of several, tells apart."""
    head = head[-1] if isinstance(head, (list, tuple)) else head or {}
    return head.get('num_classes')
