"""Draw what the demo's detector finds beside the ground truth, its curves, and write its figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any, Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

ROWS, COLUMNS = 3, 4  # scenes of the picture: the first of the validation split
SCORE = 0.4  # predictions below are not drawn
COLOURS = plt.get_cmap('tab10').colors


def read_lines(work_dir: Path, key: str) -> list[dict[str, Any]]:
    """What a training run, also one that was interrupted, logged with a key, by step."""
    lines = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in map(json.loads, file.read_text().splitlines()):
            if key in line:
                # a resumed run repeats the steps after its last checkpoint: the later value counts
                lines[line['step']] = line
    return [lines[step] for step in sorted(lines)]


def read_log(work_dir: Path, train_key: str, val_keys: Sequence[str]) -> dict[str, Any]:
    """Curves of a training run that counts epochs: key -> list of (training step, value)."""
    train = read_lines(work_dir, train_key)
    curves = {train_key: [(x['step'], x[train_key]) for x in train]}
    steps_an_epoch = train[-1]['step'] / train[-1]['epoch']
    for key in val_keys:  # a validation logs the epoch as its step
        curves[key] = [(x['step'] * steps_an_epoch, x[key]) for x in read_lines(work_dir, key)]
    return curves


def show_image(ax: Any, image: Any, **kwargs: Any) -> None:
    ax.imshow(image, **kwargs)
    ax.set_xticks([])
    ax.set_yticks([])


def draw_labels(ax: Any, boxes: Sequence[tuple[Any, int, str]]) -> None:
    """Label boxes (x, y, w, h), class, text; each where it hides the least, within the picture."""
    ax.apply_aspect()
    to_data = ax.transData.inverted()
    x0, x1 = sorted(ax.get_xlim())
    y0, y1 = sorted(ax.get_ylim())
    taken: list[tuple[float, float, float, float]] = []
    for number, ((x, y, w, h), label, text) in enumerate(boxes):
        words = ax.text(
            x,
            y,
            text,
            fontsize=8,
            color='white',
            va='bottom',
            bbox=dict(facecolor=COLOURS[label], edgecolor='none', pad=1.2),
        )
        inner = words.get_window_extent()
        words.update_bbox_position_size(ax.figure.canvas.get_renderer())
        outer = words.get_bbox_patch().get_window_extent()
        width, height = abs(np.diff(to_data.transform(outer), axis=0))[0]
        others = [box for i, (box, _, _) in enumerate(boxes) if i != number]

        def cost(place: tuple[float, float]) -> float:
            spot = (*place, width, height)  # noqa: B023
            return 9 * sum(overlap(spot, t) for t in taken) + sum(overlap(spot, o) for o in others)  # noqa: B023

        # above, below, beside, inside; the first of the best
        lefts, tops = (x, x + w - width), (y - height - 1, y + h + 1)
        places = [(left, top) for top in tops for left in lefts]
        places += [(left, top) for left in (x - width - 1, x + w + 1) for top in (y, y + h - height)]
        places += [(left, top) for left in lefts for top in (y, y + h - height)]
        places = [(min(max(left, x0), x1 - width), min(max(top, y0), y1 - height)) for left, top in places]
        left, top = min(places, key=cost)
        taken.append((left, top, width, height))
        margin = (width - abs(np.diff(to_data.transform(inner), axis=0))[0][0]) / 2
        words.set_position((left + margin, top + height - margin))


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Common area of two boxes (x, y, w, h)."""
    w, h = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(w, 0) * max(h, 0)


def draw_boxes(ax: Any, image: Image.Image, boxes: Sequence[tuple[Any, int, str]]) -> None:
    show_image(ax, image)
    for (x, y, w, h), label, _ in boxes:
        ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=COLOURS[label], linewidth=1.8))
    draw_labels(ax, boxes)


def draw_predictions(path: Path, coco: COCO, found: COCO, folder: Path, title: str) -> None:
    """A grid of scenes, ground truth at the left and prediction at the right of each pair."""
    fig = plt.figure(figsize=(4.08 * COLUMNS, 2.0 * ROWS + 0.75))
    grid = fig.add_gridspec(
        ROWS, COLUMNS, left=0.004, right=0.996, bottom=0.006, top=0.885, wspace=0.03, hspace=0.03
    )
    pairs = [cell.subgridspec(1, 2, wspace=0.015).subplots() for cell in grid]
    name = {c['id']: c['name'] for c in coco.dataset['categories']}
    for image_id, (left, right) in zip(coco.getImgIds(), pairs):
        image = Image.open(folder / coco.loadImgs(image_id)[0]['file_name'])
        truth = coco.loadAnns(coco.getAnnIds(image_id))
        draw_boxes(
            left,
            image,
            [(a['bbox'], a['category_id'] - 1, name[a['category_id']]) for a in truth],
        )
        predictions = [a for a in found.loadAnns(found.getAnnIds(image_id)) if a['score'] >= SCORE]
        predictions.sort(key=lambda a: a['score'])  # the surest class of a place on top
        draw_boxes(
            right,
            image,
            [
                (a['bbox'], a['category_id'] - 1, f'{name[a["category_id"]]}  {a["score"]:.2f}')
                for a in predictions
            ],
        )
    for left, right in pairs[:COLUMNS]:
        left.set_title('ground truth', fontsize=10)
        right.set_title('prediction', fontsize=10)
    fig.suptitle(title, fontsize=14, y=0.985)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_curves(path: Path, classify: dict[str, Any], detect: dict[str, Any]) -> None:
    """Loss and metric of the two trainings over their steps."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    panels = (
        ('EMOv2-1M classifies digits', classify, (('accuracy/top1', 'top-1, %', 1),)),
        (
            'RetinaNet on EMOv2-1M finds digits',
            detect,
            (('coco/bbox_mAP_50', 'AP50, %', 100), ('coco/bbox_mAP', 'AP, %', 100)),
        ),
    )
    for ax, (title, curves, metrics) in zip(axes, panels):
        ax.plot(*zip(*curves['loss']), color='0.45', label='training loss')
        ax.set(title=title, xlabel='step', ylabel='training loss', ylim=(0, None))
        right = ax.twinx()
        for (key, label, factor), colour in zip(metrics, ('tab:blue', 'tab:orange')):
            if curves[key]:
                steps, values = np.array(curves[key]).T
                right.plot(steps, values * factor, 'o-', color=colour, label=label)
        right.set(ylabel='held-out split', ylim=(0, 100))
        handles = [h for a in (ax, right) for h in a.get_lines()]
        ax.legend(handles, [h.get_label() for h in handles], loc='center right', frameon=False)
        for a in (ax, right):
            a.spines['top'].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def read_metrics(work_dir: Path) -> dict[str, float]:
    """What the last run of tools/test.py in a folder measured."""
    return json.loads(sorted(work_dir.glob('*/*.json'))[-1].read_text())


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{len(os.sched_getaffinity(0))} CPU cores'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help="the demo's work folder")
    parser.add_argument('--data', type=Path, required=True, help="the demo's data folder")
    args = parser.parse_args()
    out: Path = args.out

    classify = read_log(out / 'classify', 'loss', ['accuracy/top1'])
    detect = read_log(out / 'detect', 'loss', ['coco/bbox_mAP', 'coco/bbox_mAP_50'])
    metrics = read_metrics(out / 'test-detect')
    top1 = read_metrics(out / 'test-classify')['accuracy/top1']
    steps = json.loads((out / 'steps.json').read_text())
    names = ('data', 'classify', 'detect', 'test-classify', 'test-detect')
    seconds = {name: steps[name]['seconds'] for name in names}

    coco = COCO(str(args.data / 'coco/annotations/val.json'))
    found = coco.loadRes(str(out / 'test-detect/predictions.bbox.json'))
    ap50 = metrics['coco/bbox_mAP_50']
    title = f'RetinaNet on EMOv2-1M: box AP50 {ap50:.2f} on {len(coco.imgs)} scenes of held-out digits'
    draw_predictions(out / 'predictions.png', coco, found, args.data / 'coco/val', title)
    draw_curves(out / 'curves.png', classify, detect)

    summary = '\n'.join(
        [
            f'EMOv2-1M classifies held-out digits: top-1 {top1:.1f} %',
            f'RetinaNet on EMOv2-1M finds held-out digits: box AP {metrics["coco/bbox_mAP"]:.3f}, '
            f'AP50 {ap50:.3f}',
            f'training took {(seconds["classify"] + seconds["detect"]) / 60:.1f} minutes on {device()}',
            f'pictures: {out}/predictions.png {out}/curves.png',
            f'figures:  {out}/results.json',
        ]
    )
    results = dict(
        top1=top1,
        **{key.replace('coco/', ''): v for key, v in metrics.items() if key.startswith('coco/')},
        seconds=seconds,
        val_scenes=len(coco.imgs),
        val_boxes=len(coco.anns),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        summary=summary,
    )
    (out / 'results.json').write_text(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()
