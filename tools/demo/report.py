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


def read_log(work_dir: Path, train_key: str, val_keys: Sequence[str]) -> dict[str, Any]:
    """Curves of a training run, also one that was interrupted: key -> list of (training step, value)."""
    lines: list[dict[str, Any]] = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    # a resumed run repeats the steps after its last checkpoint: the later value counts
    train = {x['step']: x for x in lines if train_key in x}
    curves = {train_key: [(step, train[step][train_key]) for step in sorted(train)]}
    steps_an_epoch = max(train) / train[max(train)]['epoch']
    for key in val_keys:  # a validation logs the epoch as its step
        values = {x['step']: x[key] for x in lines if key in x}
        curves[key] = [(epoch * steps_an_epoch, values[epoch]) for epoch in sorted(values)]
    return curves


def draw_boxes(ax: Any, image: Image.Image, boxes: Sequence[tuple[Any, int, str]]) -> None:
    ax.imshow(image)
    ax.set_xticks([])
    ax.set_yticks([])
    for (x, y, w, h), label, text in boxes:
        colour = COLOURS[label]
        ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.8))
        at_right = x > 0.75 * image.width  # the label stays within the picture
        ax.text(
            x + w if at_right else x,
            max(y - 2, 13),
            text,
            fontsize=8,
            color='white',
            ha='right' if at_right else 'left',
            va='bottom',
            bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
        )


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
    seconds = {name: step['seconds'] for name, step in steps.items() if name != 'report'}

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
