"""Pictures of what a trained model finds: worst images first, confusion matrix, precision and recall."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..errors import note

SHOWN = 12  # images in results.png
SCORE = 0.3  # of the boxes that are drawn and counted in the confusion matrix
IOU = 0.5  # from which on a box is found


class Result(NamedTuple):
    """What a model found in an image, and what is there.

    Attributes:
        path: The image.
        quality: From 0 (all wrong) to 1 (all right): F1 of the boxes, IoU of the classes in the image, or the
            score of the true class.
        truth: Of a detector boxes, labels and masks; of a segmentor the map; of a classifier the class.
        found: The same, with scores.
    """

    path: str
    quality: float
    truth: dict[str, Any]
    found: dict[str, Any]


class ResultsHook(Hook):
    """Write ``results.png``, ``confusion_matrix.png`` and ``precision_recall.png`` to the work dir.

    ``results.png`` has the images on which the model does worst, ground truth beside prediction. The figures
    are those of the last evaluation of a training, or of a test. Of several processes only the first draws,
    from its share of the images.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self.collected: Collected | None = None

    def before_val_epoch(self, runner: Runner) -> None:
        """Reset before each evaluation, so that its results are not mixed with earlier ones."""
        self._begin(runner.val_dataloader.dataset)

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin."""
        self._begin(runner.test_dataloader.dataset)

    def _begin(self, dataset: Any) -> None:
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        self.collected = Collected(classes) if classes and is_main_process() else None

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Take up what was found in a batch."""
        for sample in outputs or ():
            if self.collected is not None:
                self.collected.add(sample)

    after_test_iter = after_val_iter

    def after_train(self, runner: Runner) -> None:
        """Write the pictures of the last evaluation, or of a test."""
        folder = Path(runner.work_dir)
        if self.collected is None or not self.collected.results:
            return
        if find_spec('matplotlib') is None:
            note('pictures of the results need matplotlib: pip install matplotlib')
            return
        self.collected.draw(folder)
        note(f'pictures of the results: {folder}/results.png, confusion_matrix.png')

    after_test = after_train


class Collected:
    """The worst results of an evaluation, and counts of all.

    Args:
        classes: Names of the classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.results: list[Result] = []  # the worst
        self.seen = 0
        self.counts: np.ndarray | None = None
        # class -> (score, whether it is right) of all boxes or images; and how many there are
        self.ranked: list[list[tuple[float, bool]]] = [[] for _ in classes]
        self.there = np.zeros(len(self.classes), int)

    def add(self, sample: Any) -> None:
        """Take up a data sample with prediction and ground truth."""
        if 'pred_instances' in sample:
            result = self._add_boxes(sample)
        elif 'pred_sem_seg' in sample:
            result = self._add_map(sample)
        else:
            result = self._add_class(sample)
        self.seen += 1
        self.results = sorted([*self.results, result], key=lambda result: result.quality)[:SHOWN]

    def _count(self, truth: np.ndarray, found: np.ndarray, size: int) -> np.ndarray:
        """Add pairs of labels to the confusion matrix; return those of this call."""
        counts = np.bincount(truth * size + found, minlength=size * size).reshape(size, size)
        self.counts = counts if self.counts is None else self.counts + counts
        return counts

    def _add_boxes(self, sample: Any) -> Result:
        truth, found = _objects(sample.gt_instances), _objects(sample.pred_instances)
        ignored = _objects(sample.ignored_instances) if 'ignored_instances' in sample else None
        order = np.argsort(-found['scores'])
        found = _select(found, order)
        overlaps = _ious(found['boxes'], truth['boxes'])
        passed = np.zeros(len(order), bool)
        if ignored is not None and len(ignored['boxes']):
            passed = _ious(found['boxes'], ignored['boxes'], of_first=True).max(axis=1) >= IOU
        right = _match(np.where(found['labels'][:, None] == truth['labels'], overlaps, 0)) >= 0
        for label, score, hit, skip in zip(found['labels'], found['scores'], right, passed):
            if hit or not skip:
                self.ranked[label].append((float(score), bool(hit)))
        np.add.at(self.there, truth['labels'], 1)

        sure = found['scores'] >= SCORE
        ground = len(self.classes)  # the last row and column: nothing there, nothing found
        matched = _match(overlaps[sure])
        pairs = [
            (truth['labels'][i] if i >= 0 else ground, x) for i, x in zip(matched, found['labels'][sure])
        ]
        pairs = [x for x, i, skip in zip(pairs, matched, passed[sure]) if i >= 0 or not skip]
        pairs += [(x, ground) for i, x in enumerate(truth['labels']) if i not in matched]
        if pairs:
            true, predicted = np.array(pairs).T
            self._count(true, predicted, ground + 1)
        hits = sum(a == b for a, b in pairs)
        quality = hits / max(1, len(pairs)) if pairs else 1.0
        kept = np.flatnonzero(sure)[:50]
        return Result(sample.img_path, quality, truth, _select(found, kept))

    def _add_map(self, sample: Any) -> Result:
        truth = sample.gt_sem_seg.data.squeeze(0).cpu().numpy()
        found = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        size = len(self.classes)
        valid = truth < size
        counts = self._count(truth[valid].astype(int), found[valid].astype(int), size)
        ious = class_ious(counts)
        quality = float(np.nanmean(ious)) if np.isfinite(ious).any() else 1.0
        return Result(
            sample.img_path, quality, dict(map=truth.astype(np.uint8)), dict(map=found.astype(np.uint8))
        )

    def _add_class(self, sample: Any) -> Result:
        truth, found = int(sample.gt_label), int(sample.pred_label)
        scores = sample.pred_score.cpu().numpy()
        self._count(np.array([truth]), np.array([found]), len(self.classes))
        for label, score in enumerate(scores):
            self.ranked[label].append((float(score), label == truth))
        self.there[truth] += 1
        quality = float(scores[truth])
        return Result(
            sample.img_path, quality, dict(label=truth), dict(label=found, score=float(scores[found]))
        )

    # ------------------------------------------------------------ figures

    def draw(self, folder: Path) -> None:
        """Write the figures.

        Args:
            folder: Where to; files of an earlier evaluation are replaced.
        """
        from .drawing import prepare_font

        prepare_font(self.classes)
        self._draw_results(folder / 'results.png')
        self._draw_matrix(folder / 'confusion_matrix.png')
        if self.there.any():
            self._draw_curves(folder / 'precision_recall.png')

    def _draw_results(self, path: Path) -> None:
        import mmcv

        from .drawing import add_legend, draw, new_sheet, save

        images = [mmcv.imread(result.path)[..., ::-1] for result in self.results]
        what = {'boxes': 'share of right boxes', 'map': 'mean IoU'}
        measure = what.get(next(iter(self.results[0].truth)), 'score of the true class')
        title = f'the {len(images)} worst of {self.seen} images by {measure}: ground truth, prediction'
        pairs = 1 if 'label' in self.results[0].truth else 2
        columns = 4 if pairs == 1 or len(images) > 4 else 2
        rows = -(-len(images) * pairs // columns)
        figure, axes = new_sheet(rows, columns, images[0].shape[:2], title)
        cells = iter(axes.flat)
        for image, result in zip(images, self.results):
            name = Path(result.path).name
            truth, found = result.truth, result.found
            if pairs == 1:
                names = self.classes[truth['label']], self.classes[found['label']]
                text = '{}, found {} {:.2f}'.format(*names, found['score'])
                draw(next(cells), image, self.classes, text)
                continue
            for part, text in ((truth, name), (found, f'{result.quality:.2f}')):
                masks = [_decode(mask) for mask in part.get('masks', ())]
                draw(
                    next(cells), image, self.classes, text,
                    part.get('boxes'), part.get('labels', ()), part.get('scores'), masks, part.get('map'),
                )  # fmt: skip
        if pairs == 2:
            add_legend(figure, self.classes)
        save(figure, path)

    def _draw_matrix(self, path: Path) -> None:
        from matplotlib.figure import Figure

        from .drawing import draw_matrix, save

        if self.counts is None or not len(self.counts):
            return
        size = len(self.counts)
        names = [*self.classes, 'nothing'][:size]
        rows = names
        if 'map' in self.results[0].truth:
            rows = [f'{name} (IoU {iou:.2f})' for name, iou in zip(names, class_ious(self.counts))]
        side = min(14, max(4, 0.45 * size + 2))
        figure = Figure((side + 1, side), layout='constrained')
        ax = figure.subplots()
        unit = 'pixels' if 'map' in self.results[0].truth else 'images'
        if 'boxes' in self.results[0].truth:
            unit = f'boxes (score {SCORE} or more, IoU {IOU} or more)'
        ax.set_title(f'{unit}; shade: share of the row', fontsize=9)
        draw_matrix(ax, self.counts, rows, names)
        save(figure, path)

    def _draw_curves(self, path: Path) -> None:
        from matplotlib.figure import Figure

        from .drawing import colour, save

        figure = Figure((6.5, 4.5), layout='constrained')
        ax = figure.subplots()
        order = sorted(np.flatnonzero(self.there), key=lambda i: -self.there[i])
        for label in order[:20]:
            recall, precision = curve(self.ranked[label], self.there[label])
            area = average_precision(recall, precision)
            ax.plot(recall, precision, color=colour(int(label)), label=f'{self.classes[label]}: {area:.3f}')
        boxes = 'boxes' in self.results[0].truth
        mean = np.mean([average_precision(*curve(self.ranked[i], self.there[i])) for i in order])
        ax.set_title(
            f'{f"boxes at IoU {IOU}" if boxes else "images"}: mean average precision {mean:.3f}', fontsize=9
        )
        ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision')
        ax.grid(alpha=0.3)
        more = f'\nand {len(order) - 20} more' if len(order) > 20 else ''
        ax.legend(fontsize=7, loc='lower left', title=f'average precision{more}', title_fontsize=7)
        save(figure, path)


def _objects(instances: Any) -> dict[str, Any]:
    """Boxes, labels, scores and encoded masks, as arrays."""
    boxes = instances.bboxes
    boxes = boxes.tensor if hasattr(boxes, 'tensor') else boxes
    found = dict(boxes=boxes.cpu().numpy().reshape(-1, 4), labels=instances.labels.cpu().numpy().astype(int))
    if 'scores' in instances:
        found['scores'] = instances.scores.cpu().numpy()
    if 'masks' in instances:
        masks = instances.masks
        masks = masks.cpu().numpy() if hasattr(masks, 'cpu') else masks.to_ndarray()
        found['masks'] = [_encode(mask) for mask in masks]
    return found


def _select(found: dict[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    """Those of the objects that are chosen, in this order."""
    return {key: [v[i] for i in chosen] if key == 'masks' else v[chosen] for key, v in found.items()}


def _encode(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Pack a mask into bits: those of all images of an evaluation may be kept for a while."""
    return np.packbits(mask.astype(bool)), mask.shape


def _decode(packed: tuple[np.ndarray, tuple[int, ...]]) -> np.ndarray:
    bits, (height, width) = packed
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


def _ious(a: np.ndarray, b: np.ndarray, of_first: bool = False) -> np.ndarray:
    """Overlaps of boxes (N, 4) with boxes (M, 4), as shares of the union, or of the first: (N, M)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(axis=1) for x in (a, b)]
    union = areas[0][:, None] + (0 if of_first else areas[1] - common)
    return common / np.maximum(union, 1e-9)


def _match(overlaps: np.ndarray) -> np.ndarray:
    """For boxes from the best on, the object that each finds; -1 for none. An object is found once."""
    found = np.full(len(overlaps), -1)
    free = overlaps.copy()
    for i in range(len(free)):
        best = int(free[i].argmax()) if free.shape[1] else -1
        if best >= 0 and free[i, best] >= IOU:
            found[i] = best
            free[:, best] = -1
    return found


def class_ious(counts: np.ndarray) -> np.ndarray:
    """IoU of each class of a confusion matrix; nan of those that are neither there nor found."""
    hits = np.diag(counts).astype(float)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def curve(ranked: list[tuple[float, bool]], there: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision, from the best score on, of scores that are right or not."""
    hits = np.array([hit for _, hit in sorted(ranked, key=lambda pair: -pair[0])], float)
    total = np.cumsum(hits)
    return total / max(1, there), total / np.arange(1, len(hits) + 1)


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """COCO's average precision: that at 101 recalls, each the best of any recall from there on."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side='left')
    return float(np.mean([best[i] if i < len(best) else 0.0 for i in places]))
