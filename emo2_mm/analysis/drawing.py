"""Draw images with boxes, masks, maps and classes into contact sheets. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..errors import note
from ..fonts import use_font_for

_maps: list[Any] = [colormaps['tab10'], colormaps['Set3']]  # lists of colours, as not all maps are
COLOURS = tuple(colour for each in _maps for colour in each.colors)


def colour(label: int) -> tuple[float, float, float]:
    """The colour of a class."""
    return COLOURS[label % len(COLOURS)]


def prepare_font(names: Sequence[str]) -> None:
    """Use a font that has the characters of the class names, or say that there is none."""
    message = use_font_for(names)
    if message:
        note(message)


def new_sheet(rows: int, columns: int, shape: Sequence[int], title: str) -> tuple[Figure, np.ndarray]:
    """Make a figure of axes without ticks, whose cells have the proportions of an image.

    Args:
        rows: Rows of cells.
        columns: Columns of cells.
        shape: Height and width of a typical image.
        title: What stands above.

    Returns:
        The figure, and the axes (rows, columns).
    """
    width = min(4.2, 14 / columns)
    height = width * min(max(shape[0] / shape[1], 0.5), 1.6) + 0.28
    figure = Figure((width * columns, height * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for ax in axes.flat:
        ax.axis('off')
    return figure, axes


def draw(
    ax: Axes,
    image: np.ndarray,
    names: Sequence[str],
    title: str = '',
    boxes: np.ndarray | None = None,
    labels: Sequence[int] = (),
    scores: Sequence[float] | None = None,
    masks: Sequence[np.ndarray] | None = None,
    label_map: np.ndarray | None = None,
) -> None:
    """Draw an image with what is known of it.

    Args:
        ax: Where to draw.
        image: RGB, uint8 (height, width, 3).
        names: Names of the classes.
        title: What stands above, shortened in its middle.
        boxes: Left, top, right, bottom in pixels (N, 4).
        labels: Classes of the boxes.
        scores: Scores of the boxes.
        masks: Masks of the objects, bool (height, width) each.
        label_map: Classes of the pixels (height, width); numbers beyond the classes are not drawn.
    """
    shown = image.astype(float) / 255
    if label_map is not None:
        known = label_map < len(names)
        tint = np.array([colour(i) for i in range(len(names))])[np.where(known, label_map, 0)]
        shown = np.where(known[..., None], 0.45 * shown + 0.55 * tint, shown)
    for label, mask in zip(labels, masks if masks is not None else ()):
        shown[mask] = 0.5 * shown[mask] + 0.5 * np.array(colour(label))
    ax.imshow(shown, interpolation='nearest' if max(image.shape) < 200 else 'antialiased')
    ax.set_title(title if len(title) < 45 else f'{title[:20]} ... {title[-20:]}', fontsize=7)
    many = boxes is not None and len(boxes) > 12
    for i, (left, top, right, bottom) in enumerate(boxes if boxes is not None else ()):
        line = colour(labels[i])
        patch = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=line, linewidth=1.2)
        ax.add_patch(patch)
        text = names[labels[i]] if not many else ''
        if scores is not None:
            text = f'{text} {scores[i]:.2f}'.strip()
        if text:
            frame = dict(facecolor=line, edgecolor='none', pad=0.6, alpha=0.8)
            ax.text(left, top, text, fontsize=5, color='white', bbox=frame, va='bottom', clip_on=True)


def add_legend(figure: Figure, names: Sequence[str], limit: int = 20) -> None:
    """Add the colours of the classes, of many the first ones."""
    handles = [Patch(color=colour(i), label=name) for i, name in enumerate(names[:limit])]
    if len(names) > limit:
        handles.append(Patch(color='none', label=f'and {len(names) - limit} more'))
    figure.legend(handles=handles, loc='outside lower center', ncols=min(8, len(handles)), fontsize=7)


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_matrix(ax: Axes, counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """Draw a confusion matrix: shares of each row as shades, counts as numbers where there is room."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    ax.set_xticks(range(len(columns)), columns, rotation=60, ha='right', fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.set_xlabel('predicted')
    ax.set_ylabel('ground truth')
    if counts.size <= 400:
        for (row, column), count in np.ndenumerate(counts):
            text = f'{count:,}' if count < 1e5 else f'{shares[row, column]:.1%}'
            if count:
                dark = shares[row, column] > 0.5
                ax.text(
                    column,
                    row,
                    text,
                    ha='center',
                    va='center',
                    fontsize=6,
                    color='white' if dark else 'black',
                )
