"""Check folders of classes, or the images that an annotation file lists with labels."""

from __future__ import annotations

import os
from typing import Any

from mmengine.config import ConfigDict

from ..report import Report, repeated
from .images import read_all, read_image
from .segmentation import classes_of, list_samples


def check_classification(dataset: Any, leaf: ConfigDict, model: ConfigDict, report: Report) -> str:
    """Check a FolderDataset."""
    folder = dataset.img_prefix
    samples = list_samples(dataset, dataset.ann_file or folder, report)
    if not samples:
        return folder
    classes = classes_of(model.get('head')) or len(dataset.CLASSES or ())
    paths = [sample['img_path'] for sample in samples]
    labels = [sample.get('gt_label', 0) for sample in samples]
    report.add(
        'CLS001',
        *(
            f'{path}: {label}, classes are 0..{classes - 1}'
            for path, label in zip(paths, labels)
            if not 0 <= label < classes
        ),
    )
    folders = getattr(dataset, 'folder_to_idx', {})  # without an annotation file
    if 0 < len(folders) < classes:
        report.add('CLS021', f'{folder}: {len(folders)} folders, {classes} classes')
    used = set(labels)
    report.add('CLS022', *(os.path.join(folder, n) for n, label in folders.items() if label not in used))
    report.add('IMG015', *repeated(paths))
    for path, picture in read_all(read_image, paths, folder):
        for code in picture.codes:
            report.add(code, path)
    return f'{folder}: {len(samples)} images, {classes} classes'
