"""Pictures of a dataset: what the network sees after the pipeline, and classes and sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from ..config import innermost_dataset
from ..datasets.context import use_own_datasets
from ..datasets.custom import apply_custom_dataset
from ..engine.preflight import check_data
from ..errors import UserError
from .drawing import add_legend, colour, draw, new_sheet, prepare_font, save

MAX_FILES = 500  # whose size or map is read for the distributions
SEED = 0


def browse_dataset(cfg: Config, split: str, out: Path, number: int = 16) -> list[Path]:
    """Draw samples and distributions of a dataset.

    Args:
        cfg: Config as :func:`~emo2_mm.config.load_config` returns it; it is changed.
        split: ``train``, ``val`` or ``test``.
        out: Folder for the pictures.
        number: Samples to draw.

    Returns:
        The files written: ``SPLIT_samples.png`` and ``SPLIT_distribution.png``.

    Raises:
        UserError: If the config has no such split, or its data cannot be used.
    """
    apply_custom_dataset(cfg)
    use_own_datasets(cfg)
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        raise UserError(f'{cfg.filename} has no {split}_dataloader')
    check_data(cfg, split)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    np.random.seed(SEED)
    dataset = DATASETS.build(loader.dataset)
    if not len(dataset):
        raise UserError(f'the {split} dataset of {cfg.filename} is empty')
    classes = list((dataset.metainfo or {}).get('classes') or [])
    prepare_font(classes)
    files = [out / f'{split}_samples.png', out / f'{split}_distribution.png']
    late = _loads_late(innermost_dataset(loader.dataset).pipeline)
    _draw_samples(dataset, classes, files[0], min(number, len(dataset)), split, late)
    _draw_distribution(dataset, classes, files[1], split)
    return files


def _loads_late(pipeline: list[dict]) -> bool:
    """Whether annotations are loaded after images are resized: then they keep the size of the file."""
    kinds = [step.get('type', '') for step in pipeline]
    return 'Resize' in kinds and 'LoadAnnotations' in kinds[kinds.index('Resize') :]


def _draw_samples(dataset: Any, classes: list[str], path: Path, number: int, split: str, late: bool) -> None:
    chosen = np.random.RandomState(SEED).permutation(len(dataset))[:number]
    samples = [dataset[i] for i in sorted(chosen.tolist())]
    images = [_to_rgb(sample['inputs']) for sample in samples]
    columns = min(4, number)
    title = f'{number} of {len(dataset)} {split} samples as the network gets them'
    figure, axes = new_sheet(-(-number // columns), columns, images[0].shape[:2], title)
    objects = 0
    for ax, sample, image in zip(axes.flat, samples, images):
        objects += _draw_sample(ax, image, sample['data_samples'], classes, late)
    if objects:
        add_legend(figure, classes)
    save(figure, path)


def _to_rgb(inputs: Any) -> np.ndarray:
    """The image of a sample, RGB uint8: pipelines leave it in BGR and without normalization."""
    pixels = inputs.numpy().transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = pixels if low >= 0 and high <= 255 else (pixels - low) / max(high - low, 1e-6) * 255
    return np.ascontiguousarray(
        pixels[..., ::-1] if pixels.shape[2] == 3 else pixels.repeat(3, 2)[..., :3]
    ).astype(np.uint8)


def _draw_sample(ax: Any, image: np.ndarray, sample: Any, classes: list[str], late: bool) -> bool:
    """Draw a sample; whether it has objects or a map."""
    name = Path(sample.get('img_path') or '').name
    title = f'{name}  {image.shape[1]} x {image.shape[0]}'
    if 'gt_sem_seg' in sample:
        label_map = sample.gt_sem_seg.data.squeeze(0).numpy().astype(int)
        if label_map.shape != image.shape[:2]:
            label_map = mmcv.imresize(label_map.astype(np.uint8), image.shape[1::-1], interpolation='nearest')
        draw(ax, image, classes, title, label_map=label_map)
        return True
    if 'gt_instances' in sample:
        instances = sample.gt_instances
        boxes = instances.bboxes
        boxes = (boxes.tensor if hasattr(boxes, 'tensor') else boxes).numpy().reshape(-1, 4)
        masks = None
        if 'masks' in instances and not late:
            masks = instances.masks.to_ndarray().astype(bool)
        if late and sample.get('scale_factor') is not None:
            boxes = boxes * np.tile(sample.scale_factor, 2)
        draw(ax, image, classes, title, boxes, instances.labels.tolist(), masks=masks)
        return True
    label = sample.gt_label.tolist() if 'gt_label' in sample else []
    names = [classes[i] if i < len(classes) else str(i) for i in label]
    draw(ax, image, classes, f'{", ".join(names)}\n{title}')
    return False


def _draw_distribution(dataset: Any, classes: list[str], path: Path, split: str) -> None:
    """Draw how often the classes occur, the sizes of the images, and those of the boxes if there are any."""
    chosen = np.random.RandomState(SEED).permutation(len(dataset))
    infos = [dataset.get_data_info(int(i)) for i in range(len(dataset))]
    counts, sizes, boxes = _count(infos, chosen, classes)
    has_boxes = any('instances' in info for info in infos)
    unit = 'boxes' if has_boxes else 'share of pixels' if 'seg_map_path' in infos[0] else 'images'
    figure = Figure((14 if has_boxes else 10, 4.6), layout='constrained')
    axes = figure.subplots(1, 3 if has_boxes else 2)
    figure.suptitle(f'{len(infos)} {split} images', fontsize=11)
    shown = counts.most_common(30)
    places = range(len(shown))
    axes[0].barh(places, [number for _, number in shown], color=[colour(label) for label, _ in shown])
    names = [classes[label] if label < len(classes) else str(label) for label, _ in shown]
    axes[0].set_yticks(places, names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set(xlabel=unit, title='classes' + f', the first 30 of {len(counts)}' * (len(counts) > 30))
    axes[0].bar_label(
        axes[0].containers[0], fontsize=6, padding=2, fmt='%.1f %%' if unit == 'share of pixels' else '%d'
    )
    axes[0].margins(x=0.15)
    _scatter(axes[1], sizes, 'sizes of images' + f' ({len(sizes)} of them)' * (len(sizes) < len(infos)))
    if has_boxes:
        _scatter(axes[2], boxes, 'sizes of boxes in the files; dashed: 32 and 96 pixels')
        for side in (32, 96):  # up to which COCO calls objects small and medium
            axes[2].plot([side, side, 0], [0, side, side], color='grey', linewidth=0.8, linestyle='--')
    save(figure, path)


def _count(
    infos: list[dict], chosen: np.ndarray, classes: list[str]
) -> tuple[Counter, list[tuple[float, float]], list[tuple[float, float]]]:
    """How often each class occurs; widths and heights of images, and of boxes."""
    counts: Any = Counter(dict.fromkeys(range(len(classes)), 0))  # percent of pixels, if there are maps
    boxes = []
    for info in infos:
        for instance in info.get('instances') or ():
            counts[instance['bbox_label']] += 1
            left, top, right, bottom = instance['bbox']
            boxes.append((right - left, bottom - top))
        for label in np.atleast_1d(info.get('gt_label', [])).tolist():
            counts[int(label)] += 1
    sizes = [(info['width'], info['height']) for info in infos if info.get('width')]
    pixels: Counter = Counter()
    for i in chosen[:MAX_FILES] if not sizes else ():
        try:
            with Image.open(infos[i]['img_path']) as image:
                sizes.append(image.size)
        except OSError:
            continue
        if infos[i].get('seg_map_path'):
            with Image.open(infos[i]['seg_map_path']) as image:
                values, numbers = np.unique(np.asarray(image), return_counts=True)
            for value, number in zip(values.tolist(), numbers.tolist()):
                pixels[(infos[i].get('label_map') or {}).get(value, value)] += number
    known = sum(number for value, number in pixels.items() if value < len(classes))
    for value, number in pixels.items():
        if value < len(classes):
            counts[value] = 100 * number / known
    return counts, sizes, boxes


def _scatter(ax: Any, sizes: list[tuple[float, float]], title: str) -> None:
    """Draw widths and heights, larger dots where many are the same."""
    ax.set(title=title, xlabel='width (pixels)', ylabel='height (pixels)')
    if not sizes:
        return
    found = Counter((round(width), round(height)) for width, height in sizes)
    x, y = zip(*found)
    most = max(found.values())
    dots = [10 + 90 * number / most for number in found.values()] if len(found) < 50 else 6
    if len(found) <= 5:
        for (width, height), number in found.items():
            text = f'{width} x {height}: {number}'
            ax.annotate(text, (width, height), (-6, -14), textcoords='offset points', ha='right', fontsize=8)
    ax.scatter(x, y, s=dots, alpha=0.5, linewidths=0)
    ax.set_xlim(0, max(x) * 1.08)
    ax.set_ylim(0, max(y) * 1.08)
    ax.grid(alpha=0.3)
