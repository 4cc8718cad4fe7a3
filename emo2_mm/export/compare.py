"""How far the outputs of an exported model are from those of torch."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from ..errors import UserError

# largest relative error of an output; int8 is judged by its accuracy
LIMITS: dict[str, float | None] = {'fp32': 1e-4, 'fp16': 1e-2, 'int8': None}
MATCHED = 0.995  # share of boxes that must be found again
SAME_PIXELS = 0.999  # share of pixels that must have the same class


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference relative to that of ``theirs``; infinity where the shapes differ."""
    if ours.shape != theirs.shape:
        return float('inf')
    difference = np.linalg.norm(ours.astype(np.float64) - theirs.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(theirs.astype(np.float64))), 1e-12))


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """IoU of boxes (K, 4) with boxes (L, 4): (K, L)."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (ours, theirs)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def match_boxes(
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    iou: float = 0.98,
    score: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of boxes of two models that agree: indices into each.

    Args:
        ours: Boxes with scores (K, 5) and labels (K,).
        theirs: The same of another model.
        iou: Least overlap.
        score: Largest difference of scores.
    """
    if not len(ours[0]) or not len(theirs[0]):
        return np.zeros(0, int), np.zeros(0, int)
    found = overlaps(ours[0][:, :4], theirs[0][:, :4])
    # boxes without area overlap nothing: within a hundredth of a pixel two are the same
    found[abs(ours[0][:, None, :4] - theirs[0][None, :, :4]).max(-1) < 0.01] = 1
    found[ours[1][:, None] != theirs[1][None]] = 0
    found[abs(ours[0][:, None, 4] - theirs[0][None, :, 4]) > score] = 0
    pairs = []
    for _ in range(min(found.shape)):
        i, j = np.unravel_index(found.argmax(), found.shape)
        if found[i, j] <= iou:
            break
        pairs.append((i, j))
        found[i], found[:, j] = 0, 0
    index = np.array(pairs, int).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def _compare_boxes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], limit: float | None) -> float:
    """Relative error of the boxes that both have; too few in common is a ``UserError``."""
    if any(ours[name].shape != theirs[name].shape for name in theirs):
        return float('inf')
    total = common = 0
    error = 0.0
    for i in range(len(theirs['dets'])):
        used = [found['labels'][i] >= 0 for found in (ours, theirs)]
        mine = ours['dets'][i][used[0]], ours['labels'][i][used[0]]
        others = theirs['dets'][i][used[1]], theirs['labels'][i][used[1]]
        pairs = match_boxes(mine, others, score=1e-3 if limit is None else max(1e-3, 10 * limit))
        total += max(len(mine[0]), len(others[0]))
        common += len(pairs[0])
        if len(pairs[0]):
            same = mine[0][pairs[0]], others[0][pairs[1]]
            for part in (slice(0, 4), slice(4, 5)):  # boxes, scores
                error = max(error, relative_error(same[0][:, part], same[1][:, part]))
            if 'masks' in theirs:
                masks = ours['masks'][i][used[0]][pairs[0]], theirs['masks'][i][used[1]][pairs[1]]
                error = max(error, relative_error(*masks))
    if limit is not None and limit <= 1e-3 and total and common < MATCHED * total:
        raise UserError(f'only {common} of {total} boxes are the same as in torch')
    return error


def compare(
    names: Sequence[str], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], limit: float | None
) -> float:
    """Largest relative error of the outputs.

    Args:
        names: Of the outputs.
        ours: Those of the exported model.
        theirs: Those of torch.
        limit: Largest error allowed; None allows any.

    Raises:
        UserError: If the error is larger, a number is not finite, fewer than 99.5 % of the boxes are found
            again, or fewer than 99.9 % of the pixels of a class map are equal (the last two in fp32 alone).
    """
    found, expected = dict(zip(names, ours)), dict(zip(names, theirs))
    errors = {}
    if 'dets' in expected:
        errors['dets'] = _compare_boxes(found, expected, limit)
    else:
        for name in names:
            if name != 'map':
                errors[name] = relative_error(found[name], expected[name])
    if 'map' in expected:
        same = (
            float((found['map'] == expected['map']).mean())
            if found['map'].shape == expected['map'].shape
            else 0
        )
        if limit is not None and limit <= 1e-3 and same < SAME_PIXELS:
            raise UserError(f'only {same:.2%} of the pixels have the same class as in torch')
    for name, error in errors.items():
        if not np.isfinite(error) or (limit is not None and error > limit):
            raise UserError(
                f'output {name} differs from torch by {error:.1e} (relative norm), more than {limit:.0e}'
                if limit is not None
                else f'output {name} is not finite or of another shape than in torch'
            )
    return max(errors.values())
