"""What a dataset holds, whatever its format: pictures with objects, or with a map of classes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np


class Report:
    """Counts of what was changed, left out or noticed, with an example of each."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, what: str, where: object) -> None:
        """Count a finding."""
        self.found[what].append(str(where))

    def lines(self) -> list[str]:
        """A line for each kind of finding."""
        return [f'  {len(where)} x {what} (such as {where[0]})' for what, where in self.found.items()]


@dataclass
class Thing:
    """An object in a picture.

    Attributes:
        label: Its class.
        box: Left, top, right, bottom in pixels.
        polygons: Its outline: lists x, y, x, y ... in pixels; None if there is only a box.
        rle: COCO's run lengths in place of polygons.
        crowd: Neither trained on nor counted in an evaluation (COCO's ``iscrowd``).
    """

    label: str
    box: tuple[float, ...]
    polygons: list[list[float]] | None = None
    rle: dict[str, Any] | None = None
    crowd: bool = False


@dataclass
class Picture:
    """An image with what is known of it.

    Attributes:
        path: The file; with ``data``, only its name counts.
        size: Width and height in pixels, as the loader sees them.
        split: ``train``, ``val``, ``test``, or None if the dataset does not say.
        things: Its objects.
        label: Its class, of a classification dataset.
        map: Function that returns its map of class numbers, uint8 (height, width).
        data: The bytes of an image that is in an annotation file.
    """

    path: Path
    size: tuple[int, int]
    split: str | None = None
    things: list[Thing] = field(default_factory=list)
    label: str | None = None
    map: Callable[[], np.ndarray] | None = None
    data: bytes | None = None


@dataclass
class Dataset:
    """The pictures of a dataset, its classes in order, and what was found while reading it."""

    pictures: list[Picture]
    classes: list[str]
    report: Report


def box_of(points: list[float]) -> tuple[float, float, float, float]:
    """The box around x, y, x, y ..."""
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def add_thing(picture: Picture, thing: Thing, report: Report, where: object) -> None:
    """Add an object to a picture, cut to it; or report why it is left out."""
    values = [*thing.box, *(x for polygon in thing.polygons or [] for x in polygon)]
    if not np.isfinite(values).all():
        report.add('object has numbers that are not finite: left out', where)
        return
    width, height = picture.size
    left, top, right, bottom = thing.box
    if left > right or top > bottom:
        report.add('box has its corners swapped: put in order', where)
        left, right, top, bottom = min(left, right), max(left, right), min(top, bottom), max(top, bottom)
    cut = (
        *(min(max(left, 0.0), width), min(max(top, 0.0), height)),
        *(min(max(right, 0.0), width), min(max(bottom, 0.0), height)),
    )
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        outside = right <= 0 or bottom <= 0 or left >= width or top >= height
        what = 'object is outside its image' if outside else 'box has no area'
        report.add(f'{what}: left out', where)
        return
    if max(abs(a - b) for a, b in zip(cut, (left, top, right, bottom))) > 0.5:
        report.add('object is partly outside its image: cut to it', where)
    thing.box = tuple(float(x) for x in cut)
    if thing.polygons is not None:
        short = [polygon for polygon in thing.polygons if len(polygon) < 6]
        if short:
            report.add('outline has less than three points: left out, the box is kept', where)
        limits = width, height
        thing.polygons = [
            [min(max(float(x), 0.0), float(limits[i % 2])) for i, x in enumerate(polygon)]
            for polygon in thing.polygons
            if len(polygon) >= 6
        ] or None
    picture.things.append(thing)
