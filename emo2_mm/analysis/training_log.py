"""Read the logs of training runs and draw their curves.

A run is a work dir, or one scalars.json. A run that was interrupted and resumed left several of these in
its work dir: they are joined. From where a later one begins, it replaces the earlier ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Dict, NamedTuple, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Line = Dict[str, float]
Lines = Dict[float, Line]  # by the "step" they were logged at

NOT_DRAWN = ('step', 'iter', 'epoch', 'time', 'data_time', 'memory')
PATTERNS = ('*/vis_data/scalars.json', 'vis_data/scalars.json', 'scalars.json')
COLUMNS = 3  # of panels
FEW = 20  # so many points are marked


class Run(NamedTuple):
    """What a run logged in training, by iteration, and in validation.

    Validations are logged by epoch, and ``epoch_length`` is the number of iterations of one; in a run that
    does not count epochs ``epoch_length`` is None, and they are by iteration too.
    """

    name: str
    train: Lines
    val: Lines
    epoch_length: float | None

    def logged(self) -> list[str]:
        """The keys that can be drawn."""
        lines = [*self.train.values(), *self.val.values()]
        return list(dict.fromkeys(key for line in lines for key in line if key not in NOT_DRAWN))

    def curve(self, key: str, in_epochs: bool) -> tuple[list[float], list[float]]:
        """When a key was logged, in epochs or iterations, and its values."""
        points = {step: line[key] for step, line in self.train.items() if key in line}
        length: Any = self.epoch_length  # where it is None, in_epochs is False
        factor = 1 / length if in_epochs else 1
        if not points:
            points = {step: line[key] for step, line in self.val.items() if key in line}
            factor = length if length and not in_epochs else 1
        steps = sorted(points)
        return [step * factor for step in steps], [points[step] for step in steps]


def read_file(path: Path) -> list[Line]:
    """Read the numbers in a scalars.json. Its last line may be cut off, if the run was."""
    texts = path.read_text().splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f'{path}: line {number} is not JSON: {error}') from None
        else:
            lines.append({key: value for key, value in line.items() if isinstance(value, (int, float))})
    return lines


def read_run(path: Path, name: str) -> Run:
    """Read a work folder or a scalars.json.

    Raises:
        ValueError: If no training was logged there.
    """
    found = [path] if path.is_file() else next(filter(None, (sorted(path.glob(p)) for p in PATTERNS)), [])
    if not found:
        there = 'it has none' if path.is_dir() else 'there is no such file or folder'
        raise ValueError(f'{path}: give a work folder with */vis_data/scalars.json in it; {there}')
    train: Lines = {}
    val: Lines = {}
    for file in found:
        lines = read_file(file)
        new = {line['step']: line for line in lines if 'lr' in line}
        if new:
            first = min(new)
            first_val = new[first].get('epoch', first)
            train = {step: line for step, line in train.items() if step < first}
            val = {step: line for step, line in val.items() if step < first_val}
        train.update(new)
        val.update({line['step']: line for line in lines if 'lr' not in line})
    if not train:
        raise ValueError(f'{path}: no training was logged in {", ".join(map(str, found))}')
    return Run(name, train, val, find_epoch_length(train))


def find_epoch_length(train: Lines) -> float | None:
    """Find the iterations of an epoch from the first that were logged of two; None without epochs."""
    firsts: dict[float, float] = {}
    for step in sorted(train, reverse=True):
        if 'epoch' in train[step]:
            firsts[train[step]['epoch']] = step
    if len(firsts) < 2:
        return max(train) / max(firsts) if firsts else None
    last, first = max(firsts), min(firsts)
    return (firsts[last] - firsts[first]) / (last - first)


def choose_keys(runs: Sequence[Run]) -> list[str]:
    """The loss, the learning rate and the metrics, but for COCO's -1: of a size that no box has."""
    keys = [key for key in ('loss', 'lr') if any(key in run.logged() for run in runs)]
    for run in runs:
        metrics = [key for key in run.logged() if any(line.get(key, -1) != -1 for line in run.val.values())]
        keys += [key for key in metrics if key not in keys]
    return keys


def draw(runs: Sequence[Run], keys: Sequence[str], path: Path) -> None:
    """Draw a panel for each key, with a curve of each run that logged it."""
    in_epochs = all(run.epoch_length for run in runs)
    columns = min(len(keys), COLUMNS)
    rows = math.ceil(len(keys) / columns)
    size = (4.2 * columns, 2.9 * rows + 0.3)
    fig = Figure(size, layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False)
    ends = [run.curve(key, in_epochs)[0][-1] for run in runs for key in keys if key in run.logged()]
    for ax, key in zip(axes.flat, keys):
        for number, run in enumerate(runs):
            if key not in run.logged():
                continue
            steps, values = run.curve(key, in_epochs)
            colour = f'C{number}'
            ax.plot(steps, values, 'o-' if len(steps) <= FEW else '-', color=colour, markersize=4)
            if math.isfinite(values[-1]):
                place = dict(xytext=(5, 0), textcoords='offset points', va='center')
                ax.annotate(f'{values[-1]:.4g}', (steps[-1], values[-1]), color=colour, fontsize=9, **place)
        ax.set_title(key, fontsize=11)
        ax.set_xlim(0, 1.12 * max(ends))
        ax.xaxis.set_major_locator(MaxNLocator('auto', integer=max(ends) > 2))
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
    for ax in axes.flat[len(keys) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(keys) - columns, 0) : len(keys)]:  # the lowest of each column
        ax.set_xlabel('epoch' if in_epochs else 'iteration')
    handles = [Line2D([], [], color=f'C{i}', label=run.name) for i, run in enumerate(runs)]
    fig.legend(handles=handles, loc='outside upper center', ncol=min(len(runs), columns), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
