"""Draw what each method of the demo finds beside the truth, and write how well it did."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from report import COLOURS, SCORE, device, draw_boxes, draw_labels, read_lines, read_metrics, show_image
from shrink import DIGITS, METHODS

SCENES = 6  # of a picture: the first of the validation split
CHANCES = {
    'coco/bbox_mAP': 'an untrained detector',
    'coco/segm_mAP': 'an untrained detector',
    'mIoU': 'background everywhere',
    'accuracy/top1': 'the commonest digit always',
}
NAMES = {
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'mIoU': 'mIoU',
    'accuracy/top1': 'top-1',
}
UNKNOWN = '-'
KEYS = {'mmdet': ['coco/bbox_mAP'], 'mmseg': ['mIoU'], 'mmpretrain': ['accuracy/top1']}


class Score(NamedTuple):
    """What a method reached in a metric, in percent; midway None if nothing was logged."""

    method: str
    metric: str
    chance: float
    midway: float | None
    end: float
    seconds: float


def metrics_of(cfg: Config) -> list[str]:
    """The keys of the main metrics of a config."""
    if cfg.default_scope != 'mmdet':
        return KEYS[cfg.default_scope]
    kinds = cfg.test_evaluator.metric
    return [f'coco/{kind}_mAP' for kind in ([kinds] if isinstance(kinds, str) else kinds)]


def read_scores(folder: Path, seconds: dict[str, float], chances: dict[str, float]) -> list[Score]:
    """Midway from the log of the training, the end from the test of its last checkpoint."""
    scores = []
    for name, method in METHODS.items():
        tested = read_metrics(folder / f'test-{name}')
        cfg = Config.fromfile(folder / f'configs/{name}.py')
        half = cfg.train_cfg.val_interval
        for key in metrics_of(cfg):
            percent = 100 if key.startswith('coco/') else 1
            logged = {line['step']: line[key] * percent for line in read_lines(folder / name, key)}
            end = tested.get(key, 0.0) * percent  # MMDetection has no AP where nothing is found
            if abs(logged.get(2 * half, end) - end) > 0.1:
                raise SystemExit(
                    f'error: {name} had {NAMES[key]} {logged[2 * half]:.2f} when its training ended, but its '
                    f'last checkpoint has {end:.2f}; do both again: delete {folder / name}'
                )
            scores.append(Score(method.title, key, chances[key], logged.get(half), end, seconds[name]))
    return scores


def measure_chances(data: Path) -> dict[str, float]:
    """What the metrics are, in percent, without any learning."""
    maps = [np.asarray(Image.open(path)) for path in sorted((data / 'coco/maps/val').iterdir())]
    counts = [len(list((data / 'folders/val' / digit).iterdir())) for digit in DIGITS]
    return {
        'coco/bbox_mAP': 0.0,
        'coco/segm_mAP': 0.0,
        'mIoU': 100 * float(np.mean([m == 0 for m in maps])) / (1 + len(DIGITS)),
        'accuracy/top1': 100 * max(counts) / sum(counts),
    }


def new_grid(rows: list[str], columns: int, title: str, bottom: float = 0.06) -> tuple[Any, Any]:
    """A figure of square panels with the names of the rows at the left; ``bottom`` in inches."""
    side, left, top, gap = 2.0, 0.62, 0.5, 0.05
    width = left + columns * (side + gap)
    height = top + len(rows) * (side + gap) + bottom
    fig = plt.figure(figsize=(width, height))
    grid = fig.add_gridspec(
        len(rows),
        columns,
        left=left / width,
        right=1 - gap / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=gap / side,
        hspace=gap / side,
    )
    axes = grid.subplots(squeeze=False)
    for ax, name in zip(axes[:, 0], rows):
        ax.set_ylabel(name, fontsize=11, labelpad=6)
    fig.suptitle(title, fontsize=14, y=1 - 0.28 / height, va='center')
    return fig, axes


def save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=110)
    plt.close(fig)


def row_name(title: str, scores: list[Score], metric: str | None = None) -> str:
    """A method and its metrics, one a line."""
    lines = [
        f'{NAMES[s.metric]} {s.end:.1f}' for s in scores if s.method == title and metric in (None, s.metric)
    ]
    return '\n'.join([title, ', '.join(lines)])


def label_of(annotation: dict[str, Any]) -> str:
    name = DIGITS[annotation['category_id'] - 1]
    return f'{name}  {annotation["score"]:.2f}' if 'score' in annotation else name


def found_in(coco: COCO, image_id: int) -> list[dict[str, Any]]:
    """Annotations of an image, or what was found with some certainty, the surest last."""
    annotations = coco.loadAnns(coco.getAnnIds(image_id))
    return sorted((a for a in annotations if a.get('score', 1) >= SCORE), key=lambda a: a.get('score', 1))


def draw_masks(ax: Any, image: Image.Image, annotations: list[dict[str, Any]], coco: COCO) -> None:
    pixels = np.asarray(image.convert('L').convert('RGB')) / 255  # grey, for colours are those of classes
    for a in annotations:
        pixels[coco.annToMask(a) > 0] = COLOURS[a['category_id'] - 1]
    show_image(ax, pixels)
    for a in annotations:
        ax.contour(coco.annToMask(a), [0.5], colors='white', linewidths=0.7)
    draw_labels(ax, [(a['bbox'], a['category_id'] - 1, label_of(a)) for a in annotations])


def draw_detection(path: Path, data: Path, out: Path, scores: list[Score], masks: bool) -> None:
    """Scenes with the truth and what detectors found: boxes, or masks of those that have them."""
    kind = 'segm' if masks else 'bbox'
    truth = COCO(str(data / 'coco/annotations/val.json'))
    files = {
        name: out / f'test-{name}/predictions.{kind}.json'
        for name, method in METHODS.items()
        if '/det/' in method.config and ('mask' in method.config or not masks)
    }
    rows = {'ground truth': truth}
    for name, file in files.items():
        label = row_name(METHODS[name].title, scores, f'coco/{kind}_mAP')
        found = json.loads(file.read_text())
        rows[label] = truth.loadRes(found) if found else COCO()  # it takes no empty list
    what = 'instance masks' if masks else 'boxes'
    fig, axes = new_grid(list(rows), SCENES, f'Held-out digits: {what} by detectors on EMOv2-1M')
    for row, coco in zip(axes, rows.values()):
        for ax, image_id in zip(row, truth.getImgIds()):
            image = Image.open(data / 'coco/val' / truth.loadImgs(image_id)[0]['file_name'])
            annotations = found_in(coco, image_id)
            if masks:
                draw_masks(ax, image, annotations, coco)
            else:
                boxes = [(a['bbox'], a['category_id'] - 1, label_of(a)) for a in annotations]
                draw_boxes(ax, image, boxes)
    save(fig, path)


def paint(semantic: np.ndarray) -> np.ndarray:
    """The colours of a map of classes, its background dark."""
    return np.array([(0.13, 0.13, 0.13), *COLOURS])[semantic]


def draw_maps(path: Path, data: Path, out: Path, scores: list[Score]) -> None:
    """Scenes, their semantic maps and those of the segmentors."""
    rows = {'image': data / 'coco/val', 'ground truth': data / 'coco/maps/val'}
    for name, method in METHODS.items():
        if '/seg/' in method.config:
            rows[row_name(method.title, scores)] = out / f'test-{name}/maps'
    title = 'Held-out digits: semantic maps by segmentors on EMOv2-1M'
    fig, axes = new_grid(list(rows), SCENES, title, bottom=0.45)
    for row, folder in zip(axes, rows.values()):
        for ax, file in zip(row, sorted(folder.iterdir())):
            pixels = np.asarray(Image.open(file))
            show_image(ax, pixels if pixels.ndim == 3 else paint(pixels), interpolation='nearest')
    fig.legend(
        handles=[Patch(color=c, label=d) for c, d in zip(COLOURS, DIGITS)],
        loc='lower center',
        ncol=len(DIGITS),
        frameon=False,
        fontsize=11,
        handlelength=1,
        handleheight=1,
    )
    save(fig, path)


def draw_classification(path: Path, out: Path, scores: list[Score]) -> None:
    """Some images of each digit and what the classifier takes them for."""
    [name] = [name for name, method in METHODS.items() if '/cls/' in method.config]
    samples = pickle.loads((out / f'test-{name}/predictions.pkl').read_bytes())
    [score] = [s for s in scores if s.metric == 'accuracy/top1']
    fig, axes = plt.subplots(5, len(DIGITS), figsize=(12.6, 7.6))
    fig.subplots_adjust(left=0.01, right=0.99, bottom=0.035, top=0.89, wspace=0.08, hspace=0.28)
    for digit, column in enumerate(axes.T):
        column[0].set_title(f'truth: {digit}', fontsize=11)
        chosen = [s for s in samples if int(s['gt_label']) == digit][: len(column)]
        for ax, sample in zip(column, chosen):
            show_image(ax, Image.open(sample['img_path']))
            label = int(sample['pred_label'])
            colour = 'black' if label == digit else 'tab:red'
            ax.set_xlabel(
                f'{label}   {float(sample["pred_score"][label]):.2f}',
                fontsize=10,
                labelpad=2,
                color=colour,
                weight='normal' if label == digit else 'bold',
            )
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=0.8 if label == digit else 2.5)
    title = f'Held-out digits: EMOv2-1M that learned from a teacher, top-1 {score.end:.1f} %; errors are red'
    fig.suptitle(title, fontsize=14, y=0.975)
    save(fig, path)


def write_results(out: Path, scores: list[Score], pictures: list[Path]) -> None:
    """results.json, and the same as a table of Markdown."""
    header = ['method', 'metric', 'chance, %', 'midway, %', 'end, %', 'minutes']
    rows = [
        [
            s.method,
            NAMES[s.metric],
            f'{s.chance:.1f}',
            UNKNOWN if s.midway is None else f'{s.midway:.1f}',
            f'{s.end:.1f}',
            f'{s.seconds / 60:.1f}',
        ]
        for s in scores
    ]
    text_columns = 2
    title = f'EMOv2-1M on held-out digits, trained on {device()}'
    rule = ['---' if i < text_columns else '---:' for i in range(len(header))]
    lines = [' | '.join(row).join(('| ', ' |')) for row in (header, rule, *rows)]
    notes = [f'chance of {NAMES[key]}: {what}' for key, what in CHANCES.items()]
    if any(s.midway is None for s in scores):
        notes.append(f'{UNKNOWN}: found nothing yet, or the evaluation was interrupted')
    (out / 'results.md').write_text('\n'.join([f'# {title}', '', *lines, '', *notes, '']))
    minutes = sum({s.method: s.seconds for s in scores}.values()) / 60
    summary = '\n'.join(
        [
            f'training and its evaluations took {minutes:.1f} minutes',
            'pictures: ' + ' '.join(map(str, pictures)),
            f'figures:  {out / "results.json"} {out / "results.md"}',
        ]
    )
    results = dict(
        title=title,
        scores=[s._asdict() for s in scores],
        chances=CHANCES,
        table=[header, *rows],
        text_columns=text_columns,
        summary=summary,
    )
    (out / 'results.json').write_text(json.dumps(results, indent=2))


def check(scores: list[Score]) -> None:
    """End the program if a method has not learned."""
    idle = [
        f'{s.method}: {NAMES[s.metric]} {s.midway or 0:.1f} midway, {s.end:.1f} at the end, '
        f'by chance {s.chance:.1f}'
        for s in scores
        if not (s.end > (s.midway or 0) and s.end > max(2 * s.chance, 5))
    ]
    if idle:
        raise SystemExit('error: not clearly above chance and rising:\n' + '\n'.join(idle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('demo', type=Path, help="the demo's work folder; results go into its all/")
    parser.add_argument('--data', type=Path, required=True, help="the demo's data folder")
    args = parser.parse_args()
    out: Path = args.demo / 'all'

    steps = json.loads((args.demo / 'steps.json').read_text())
    seconds = {name: steps[name]['seconds'] for name in METHODS}
    scores = read_scores(out, seconds, measure_chances(args.data))
    pictures = [out / f'{name}.png' for name in ('classification', 'boxes', 'masks', 'maps')]
    draw_classification(pictures[0], out, scores)
    draw_detection(pictures[1], args.data, out, scores, masks=False)
    draw_detection(pictures[2], args.data, out, scores, masks=True)
    draw_maps(pictures[3], args.data, out, scores)
    write_results(out, scores, pictures)
    check(scores)


if __name__ == '__main__':
    main()
