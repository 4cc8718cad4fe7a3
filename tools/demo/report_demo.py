"""Draw the predictions of the demo next to the ground truth, and write its figures."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as run_length
from shrink import DIGITS, METHODS, Method

from emo2_mm.analysis.training_log import draw, read_run

SCENES = 6  # in a row of a picture: the first of the validation split
SCORE = 0.4  # predictions below are not drawn
COLOURS = colormaps['tab10'].colors
METRICS = {  # key -> name, and what scores by chance
    'coco/bbox_mAP': ('box AP', 'an untrained detector'),
    'coco/segm_mAP': ('mask AP', 'an untrained detector'),
    'mIoU': ('mIoU', 'background everywhere'),
    'accuracy/top1': ('top-1', 'always the most frequent digit'),
}
CURVES = ['loss', 'lr', 'grad_norm', 'accuracy/top1', 'coco/bbox_mAP', 'coco/bbox_mAP_50']

Panel = Callable[[Axes], None]  # draws into one panel of a picture


class Score(NamedTuple):
    """What a method reached in a metric, in percent; midway is None if nothing was logged."""

    method: str
    metric: str
    chance: float
    midway: float | None
    end: float
    seconds: float


# --- Figures --------------------------------------------------------------------------------------


def read_metrics(work_dir: Path) -> dict[str, float]:
    """What the last run of tools/test.py in a work dir measured."""
    return json.loads(sorted(work_dir.glob('*/*.json'))[-1].read_text())


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{len(os.sched_getaffinity(0))} CPU cores'


def measure_chances(data: Path) -> dict[str, float]:
    """What the metrics are, in percent, without any training."""
    maps = [np.asarray(Image.open(path)) for path in sorted((data / 'coco/maps/val').iterdir())]
    counts = [len(list((data / 'folders/val' / digit).iterdir())) for digit in DIGITS]
    return {
        'coco/bbox_mAP': 0.0,
        'coco/segm_mAP': 0.0,
        'mIoU': 100 * float(np.mean([m == 0 for m in maps])) / (1 + len(DIGITS)),
        'accuracy/top1': 100 * max(counts) / sum(counts),
    }


def metrics_of(method: Method) -> list[str]:
    if '/det/' in method.config:
        return ['coco/bbox_mAP'] + ['coco/segm_mAP'] * ('mask' in method.config)
    return ['mIoU' if '/seg/' in method.config else 'accuracy/top1']


def read_scores(
    out: Path, methods: dict[str, Method], seconds: dict[str, float], chances: dict[str, float]
) -> list[Score]:
    """Midway from the log of the training, the end from the test of its last checkpoint."""
    scores = []
    for name, method in methods.items():
        tested = read_metrics(out / f'test-{name}')
        validations = read_run(out / name, name).val
        half = Config.fromfile(out / f'configs/{name}.py').train_cfg.val_interval
        for key in metrics_of(method):
            percent = 100 if key.startswith('coco/') else 1
            midway = validations.get(half, {}).get(key)
            midway = None if midway is None else midway * percent
            end = tested.get(key, 0.0) * percent  # MMDetection has no AP where nothing is detected
            scores.append(Score(method.title, key, chances[key], midway, end, seconds[name]))
    return scores


def check_scores(scores: list[Score]) -> None:
    """Exit with an error if a method has not learned."""
    idle = [s for s in scores if not (s.end > (s.midway or 0) and s.end > max(2 * s.chance, 5))]
    if idle:
        raise SystemExit(f'error: not clearly above chance and rising:\n{make_table(idle)}')


def make_table(scores: list[Score]) -> str:
    """The scores as a table of Markdown."""
    rows = [['method', 'metric', 'chance, %', 'midway, %', 'end, %', 'minutes'], ['---'] * 2 + ['---:'] * 4]
    for s in scores:
        midway = '-' if s.midway is None else f'{s.midway:.1f}'  # nothing detected yet, or interrupted
        name = METRICS[s.metric][0]
        rows.append([s.method, name, f'{s.chance:.1f}', midway, f'{s.end:.1f}', f'{s.seconds / 60:.1f}'])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in rows)


# --- Pictures -------------------------------------------------------------------------------------


def save_grid(
    path: Path, title: str, rows: Sequence[tuple[str, Sequence[Panel]]], legend: bool = False
) -> None:
    """Save a picture of rows, each a name and its panels; the legend has the colours of the digits."""
    size = (2.1 * len(rows[0][1]) + 0.5, 2.1 * len(rows) + 0.6)
    fig = Figure(size, layout='constrained')
    for axes, (name, panels) in zip(fig.subplots(len(rows), len(rows[0][1]), squeeze=False), rows):
        axes[0].set_ylabel(name, fontsize=11)
        for ax, panel in zip(axes, panels):
            panel(ax)
            ax.set(xticks=[], yticks=[])
    if legend:
        handles = [Patch(color=c, label=d) for c, d in zip(COLOURS, DIGITS)]
        fig.legend(handles=handles, loc='outside lower center', ncol=len(DIGITS), frameon=False)
    fig.suptitle(title, fontsize=14)
    fig.savefig(path, dpi=110)


def draw_scene(ax: Axes, image: Path, annotations: list[dict[str, Any]], masks: bool) -> None:
    """An image with labelled boxes, or in grey with labelled instance masks in the colours of the digits."""
    pixels = np.asarray(Image.open(image).convert('L' if masks else 'RGB').convert('RGB')) / 255
    for a in annotations if masks else ():
        mask = run_length.decode(a['segmentation'])
        pixels[mask > 0] = COLOURS[a['category_id'] - 1]
        ax.contour(mask, [0.5], colors='white', linewidths=0.7)
    ax.imshow(pixels)
    for a in annotations:
        (x, y, w, h), colour = a['bbox'], COLOURS[a['category_id'] - 1]
        if not masks:
            ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.8))
        # above the box or below it, and within the picture
        above, left = y > 18, x + w / 2 < pixels.shape[1] / 2
        ax.text(
            x if left else x + w,
            y - 2 if above else y + h + 2,
            DIGITS[a['category_id'] - 1] + (f' {a["score"]:.2f}' if 'score' in a else ''),
            fontsize=8,
            color='white',
            ha='left' if left else 'right',
            va='bottom' if above else 'top',
            bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
        )


def scene_row(
    data: Path, annotations: list[dict[str, Any]], first: int = 0, masks: bool = False
) -> list[Panel]:
    """Panels of consecutive validation scenes with annotations, or predictions of some confidence."""
    truth = json.loads((data / 'coco/annotations/val.json').read_text())
    panels = []
    for image in truth['images'][first : first + SCENES]:
        own = [a for a in annotations if a['image_id'] == image['id'] and a.get('score', 1) >= SCORE]
        own.sort(key=lambda a: a.get('score', 1))  # the most confident on top
        file = data / 'coco/val' / image['file_name']
        panels.append(lambda ax, file=file, own=own: draw_scene(ax, file, own, masks))
    return panels


def read_truth(data: Path) -> list[dict[str, Any]]:
    return json.loads((data / 'coco/annotations/val.json').read_text())['annotations']


def row_name(method: Method, scores: list[Score], metrics: Sequence[str]) -> str:
    own = [s for s in scores if s.method == method.title and s.metric in metrics]
    ends = [f'{METRICS[s.metric][0]} {s.end:.1f}' for s in own]
    return f'{method.title}\n{", ".join(ends)}'


def draw_detection(
    path: Path, data: Path, out: Path, scores: list[Score], methods: dict[str, Method], kind: str
) -> None:
    """Validation scenes with the ground truth and the predictions of detectors, ``kind`` 'bbox' or 'segm'."""
    rows = [('ground truth', scene_row(data, read_truth(data), masks=kind == 'segm'))]
    for name, method in methods.items():
        if f'coco/{kind}_mAP' in metrics_of(method):
            found = json.loads((out / f'test-{name}/predictions.{kind}.json').read_text())
            label = row_name(method, scores, [f'coco/{kind}_mAP'])
            rows.append((label, scene_row(data, found, masks=kind == 'segm')))
    what = 'instance masks' if kind == 'segm' else 'boxes'
    save_grid(path, f'Held-out digits: {what} by detectors on EMOv2-1M', rows)


def draw_maps(path: Path, data: Path, out: Path, scores: list[Score], methods: dict[str, Method]) -> None:
    """Validation scenes, their label maps and those of the segmentors."""
    folders = {'image': data / 'coco/val', 'ground truth': data / 'coco/maps/val'}
    for name, method in methods.items():
        if '/seg/' in method.config:
            folders[row_name(method, scores, ['mIoU'])] = out / f'test-{name}/maps'

    def show(ax: Axes, file: Path) -> None:
        pixels = np.asarray(Image.open(file))
        if pixels.ndim == 2:
            pixels = np.array([(0.13, 0.13, 0.13), *COLOURS])[pixels]
        ax.imshow(pixels, interpolation='nearest')

    rows = [
        (name, [lambda ax, file=file: show(ax, file) for file in sorted(folder.iterdir())[:SCENES]])
        for name, folder in folders.items()
    ]
    save_grid(path, 'Held-out digits: label maps by segmentors on EMOv2-1M', rows, legend=True)


def draw_classification(path: Path, out: Path, scores: list[Score], methods: dict[str, Method]) -> None:
    """Five images of each digit and their predicted class."""
    [name] = [name for name, method in methods.items() if '/cls/' in method.config]
    samples = pickle.loads((out / f'test-{name}/predictions.pkl').read_bytes())

    def show(ax: Axes, sample: dict[str, Any], first: bool) -> None:
        truth, label = int(sample['gt_label']), int(sample['pred_label'])
        ax.imshow(Image.open(sample['img_path']))
        ax.set_title(f'truth: {truth}' if first else '')
        text = f'{label}   {float(sample["pred_score"][label]):.2f}'
        ax.set_xlabel(text, color='black' if label == truth else 'tab:red')
        ax.spines[:].set(color='black' if label == truth else 'tab:red', linewidth=1 if label == truth else 3)

    by_digit = [[s for s in samples if int(s['gt_label']) == digit] for digit in range(len(DIGITS))]
    rows = [
        ('', [lambda ax, s=samples[i], i=i: show(ax, s, i == 0) for samples in by_digit])
        for i in range(min(5, *map(len, by_digit)))
    ]
    [end] = [s.end for s in scores if s.metric == 'accuracy/top1']
    save_grid(
        path, f'Held-out digits: EMOv2-1M distilled from a teacher, top-1 {end:.1f} %; errors are red', rows
    )


# --- The two reports ------------------------------------------------------------------------------


def report_detector(out: Path, data: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Pictures and figures of ``make demo``."""
    metrics = read_metrics(out / 'test-detect')
    top1 = read_metrics(out / 'test-classify')['accuracy/top1']
    ap, ap50 = metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']
    truth, found = read_truth(data), json.loads((out / 'test-detect/predictions.bbox.json').read_text())
    rows = [
        (name, scene_row(data, annotations, first))
        for first in (0, SCENES)
        for name, annotations in (('ground truth', truth), ('prediction', found))
    ]
    save_grid(out / 'predictions.png', f'RetinaNet on EMOv2-1M: box AP50 {ap50:.2f} on held-out digits', rows)
    runs = [read_run(out / 'classify', 'classifier'), read_run(out / 'detect', 'RetinaNet')]
    draw(runs, CURVES, out / 'curves.png')
    minutes = (seconds['classify'] + seconds['detect']) / 60
    return dict(
        top1=top1,
        **{key.replace('coco/', ''): v for key, v in metrics.items() if key.startswith('coco/')},
        seconds=seconds,
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        summary=f'EMOv2-1M classifies held-out digits: top-1 {top1:.1f} %\n'
        f'RetinaNet on EMOv2-1M detects held-out digits: box AP {ap:.3f}, AP50 {ap50:.3f}\n'
        f'training took {minutes:.1f} minutes on {device()}\n'
        f'pictures: {out}/predictions.png {out}/curves.png\n'
        f'figures:  {out}/results.json',
    )


def report_all(
    out: Path, data: Path, seconds: dict[str, float], methods: dict[str, Method] = METHODS
) -> dict[str, Any]:
    """Pictures and figures of ``make demo-all``."""
    scores = read_scores(out, methods, seconds, measure_chances(data))
    draw_classification(out / 'classification.png', out, scores, methods)
    draw_detection(out / 'boxes.png', data, out, scores, methods, 'bbox')
    draw_detection(out / 'masks.png', data, out, scores, methods, 'segm')
    draw_maps(out / 'maps.png', data, out, scores, methods)
    title = f'EMOv2-1M on held-out digits, trained on {device()}'
    chances = '\n'.join(f'chance of {name}: {what}' for name, what in METRICS.values())
    (out / 'results.md').write_text(f'# {title}\n\n{make_table(scores)}\n\n{chances}\n')
    check_scores(scores)
    minutes = sum({s.method: s.seconds for s in scores}.values()) / 60
    return dict(
        scores=[s._asdict() for s in scores],
        summary=f'{title}\n\n{make_table(scores)}\n\n'
        f'training and its evaluations took {minutes:.1f} minutes\n'
        f'pictures: {out}/classification.png {out}/boxes.png {out}/masks.png {out}/maps.png\n'
        f'figures:  {out}/results.json {out}/results.md',
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('demo', type=Path, help="the demo's work dir")
    parser.add_argument('--data', type=Path, required=True, help="the demo's data")
    parser.add_argument('--all', action='store_true', help='report all methods, in all/ of the work dir')
    args = parser.parse_args()
    steps = json.loads((args.demo / 'steps.json').read_text())
    seconds = {name: step['seconds'] for name, step in steps.items()}
    out = args.demo / 'all' if args.all else args.demo
    results = (report_all if args.all else report_detector)(out, args.data, seconds)
    (out / 'results.json').write_text(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()
