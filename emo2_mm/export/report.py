"""Times of exported models, and the table that compares them."""

from __future__ import annotations

import re
from statistics import median
from typing import Any, Callable

from rich.console import Console
from rich.table import Table

from ..analysis.timing import interleaved

COLUMNS = ('model', 'MB', 'error', 'ms', 'nms', 'accuracy')
NMS = {'detections': 'inside', 'boxes': 'predict.py'}  # where it is done, by what a model answers


def is_checked(entry: dict[str, Any]) -> bool:
    """Whether a model of model.json cannot run here: then its ``error`` says in words how it was checked."""
    return re.fullmatch(r'[-+.\de]+', entry['error']) is None


def time_models(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of one call of each, medians of runs in alternation."""
    rounds = list(interleaved(list(runs.values()), 'cpu'))
    return {name: round(1e3 * median(took[i] for took in rounds), 2) for i, name in enumerate(runs)}


def table_rows(
    models: dict[str, dict[str, Any]], failed: dict[str, str], torch_ms: float | None
) -> list[dict[str, Any]]:
    """A row for torch, for each entry of model.json, and for each format that failed."""
    rows: list[dict[str, Any]] = [] if torch_ms is None else [dict(model='torch', ms=torch_ms)]
    for name, entry in models.items():
        accuracy = entry.get('accuracy', {}).get('value')
        row = dict(model=name, MB=entry['MB'], error=entry['error'], ms=entry.get('ms'), accuracy=accuracy)
        rows.append({**row, 'nms': NMS.get(entry['answers'])})
    return rows + [dict(model=name, error=f'failed: {why}') for name, why in failed.items()]


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return columns, [['' if row.get(key) is None else str(row[key]) for key in columns] for row in rows]


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows of :func:`table_rows`."""
    columns, cells = _cells(rows)
    table = Table(*columns)
    for row in cells:
        table.add_row(*row)
    console.print(table, markup=False)


def markdown_rows(rows: list[dict[str, Any]]) -> str:
    """Rows of :func:`table_rows` as a table in Markdown."""
    columns, cells = _cells(rows)
    return '\n'.join(f'| {" | ".join(row)} |' for row in [columns, ['---'] * len(columns), *cells]) + '\n'
