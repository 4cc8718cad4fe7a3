"""Tables and plots of the benchmark; ``python benchmarks/report.py DIR`` draws them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Iterator

from rich.console import Console
from rich.table import Table

BLUE, ORANGE, GREEN, VIOLET, GREY, INK = '#1f6feb', '#e8710a', '#1a7f37', '#8250df', '#9aa4b2', '#24292f'
NETWORKS = {
    'plain': ('baseline', GREY),
    'eager': ('EMOv2', BLUE),
    'deployed': ('EMOv2, deployed', ORANGE),
}
KINDS = {
    'eager': ('inference', BLUE),
    'deployed': ('inference, deployed', ORANGE),
    'onnx': ('inference in ONNX Runtime', INK),
    'train': ('training step', GREEN),
    'memory': (None, VIOLET),  # a panel of its own
}


def amount(value: float, unit: str) -> str:
    return f'{value * 1e3:.1f} ms' if unit == 'seconds' else f'{value / 1e6:.0f} MB'


def errors(case: dict[str, Any]) -> str:
    return ' / '.join(f'{error:.0e}' for error in case['errors'].values())


def one_line(row: dict[str, Any]) -> str:
    """Result of one case, or of one image size of the scale, as a line."""
    if 'side' in row:
        costs = (f'{name} {row[n]["seconds"] / row["megapixels"]:.2f}' for n, (name, _) in NETWORKS.items())
        return f'[cyan]scale-{row["side"]}[/] seconds per megapixel: {", ".join(costs)}'
    head = f'[cyan]{row["name"]}[/]'
    if not row['agrees']:
        return f'{head} [bold red]results differ[/], not timed; relative errors: {errors(row)}'
    sides = f'baseline {amount(row["plain"], row["unit"])}, EMOv2 {amount(row["emo2"], row["unit"])}'
    if row['unit'] == 'bytes':
        return f'{head} [bold]{row["ratio"]:.2f}[/] of the memory: {sides}'
    low, high = row['quartiles']
    return f'{head} [bold]{row["ratio"]:.2f} x[/] as fast ({low:.2f} - {high:.2f}): {sides}'


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """The tables of all sections that were measured."""
    if results.get('cases'):
        yield case_table(results['cases'])
    if results.get('scale'):
        yield scale_table(results['scale'])
    if results.get('peers'):
        yield peer_table(results['peers'])
    for row in results.get('profile', []):
        yield operator_table(row)


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify='left', title_style='bold')
    for i, column in enumerate(columns):
        table.add_column(column, justify='left' if i == 0 else 'right', no_wrap=i == 0)
    return table


def case_table(cases: list[dict[str, Any]]) -> Table:
    title = (
        'EMOv2 against the baseline. Ratio: baseline / EMOv2 of time, EMOv2 / baseline of memory.\n'
        'Error: relative, of the feature maps / of the gradients'
    )
    table = table_of(title, 'case', 'baseline', 'EMOv2', 'ratio', 'quartiles', 'pairs', 'error')
    for case in cases:
        if not case['agrees']:
            table.add_row(case['name'], '', '', '[bold red]differs[/]', '', '', errors(case))
            continue
        sides = (amount(case[side], case['unit']) for side in ('plain', 'emo2'))
        low, high = case['quartiles']
        spread = f'{low:.2f} - {high:.2f}' if len(case['pairs']) > 1 else ''
        ratio = f'[bold]{case["ratio"]:.2f}[/]'
        table.add_row(case['name'], *sides, ratio, spread, str(len(case['pairs'])), errors(case))
    return table


def scale_table(rows: list[dict[str, Any]]) -> Table:
    names = [name for name, _ in NETWORKS.values()]
    title = 'Inference on one square image, per megapixel'
    table = table_of(title, 'side', *(f'{name}, ms' for name in names), *(f'{name}, MB' for name in names))
    for row in rows:
        times = (f'{1e3 * row[n]["seconds"] / row["megapixels"]:.0f}' for n in NETWORKS)
        memory = (f'{row[n]["bytes"] / 1e6 / row["megapixels"]:.0f}' for n in NETWORKS)
        table.add_row(str(row['side']), *times, *memory)
    return table


def peer_table(rows: list[dict[str, Any]]) -> Table:
    batches = list(rows[0]['images_per_second'])
    title = (
        f'Comparable models, fp32: images/s with {" and ".join(batches)} at once; '
        'ORT: milliseconds of ONNX Runtime for one image; top-1 as reported'
    )
    speeds = (f'images/s, {batch}' for batch in batches)
    onnx = ('ORT, ms',) if any(row['onnx_seconds'] for row in rows) else ()
    columns = ('model', 'size', 'params, M', 'mult-adds, M', *speeds, *onnx, 'top-1, %', 'reported by')
    table = table_of(title, *columns)
    for row in rows:
        cells = [row['name'], str(row['side']), f'{row["params"] / 1e6:.1f}', f'{row["flops"] / 1e6:.0f}']
        cells += [f'{row["images_per_second"][batch]:.1f}' for batch in batches]
        if onnx:
            cells.append(f'{1e3 * row["onnx_seconds"]:.1f}' if row['onnx_seconds'] else '')
        table.add_row(*cells, f'{row["top1"]:.1f}', row['source'])
    return table


def operator_table(row: dict[str, Any]) -> Table:
    title = f'{row["case"]}, {"EMOv2" if row["network"] == "emo2" else "baseline"}'
    table = table_of(title, 'operator', 'share of time', 'ms a step', 'calls a step')
    for op in row['operators']:
        table.add_row(
            op['name'], f'{100 * op["share"]:.1f} %', f'{1e3 * op["seconds"]:.1f}', f'{op["calls"]:.0f}'
        )
    return table


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw benchmark.png, benchmark_scale.png and benchmark_peers.png of the sections that there are."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    style = {
        'font.size': 11,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.titlelocation': 'left',
        'axes.titleweight': 'bold',
        'savefig.dpi': 160,
    }
    cases = [case for case in results.get('cases', []) if case['agrees']]
    for rows, plot, name in (
        (cases, draw_cases, 'benchmark'),
        (results.get('scale'), draw_scale, 'benchmark_scale'),
        (results.get('peers'), draw_peers, 'benchmark_peers'),
    ):
        if not rows:
            continue
        with plt.rc_context(style):
            figure = plot(plt, rows, f'EMOv2-{results["arch"]}')
            figure.text(0.995, 0.005, caption(results['machine']), ha='right', fontsize=8, color='#57606a')
            figure.tight_layout(rect=(0, 0.02, 1, 1))
            figure.savefig(folder / f'{name}.png')
            plt.close(figure)


def caption(machine: dict[str, Any]) -> str:
    where = machine['gpu'] or f'{machine["cpu"]}, {machine["threads"]} threads'
    return f'{where}, torch {machine["torch"]}, emo2_mm {machine["emo2_mm"]}, {machine["date"]}'


def draw_cases(plt: Any, cases: list[dict[str, Any]], title: str) -> Any:
    """Bars of the ratios: left how many times as fast, right the part of the memory."""
    panels = [[case for case in cases if case['unit'] == unit] for unit in ('seconds', 'bytes')]
    panels = [rows for rows in panels if rows]
    most = max(map(len, panels))
    size = (6.5 * len(panels), 1.8 + 0.36 * most)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, rows in zip(axes[0], panels):
        for kind, (name, colour) in KINDS.items():
            own = [(i, case) for i, case in enumerate(rows) if case['kind'] == kind]
            if own:
                axis.barh([i for i, _ in own], [c['ratio'] for _, c in own], 0.7, color=colour, label=name)
        for i, case in enumerate(rows):
            low, high = case['quartiles']
            if low < high:
                axis.plot((low, high), (i, i), '|-', color=INK, linewidth=1.2, markersize=6)
            axis.annotate(
                f'{case["ratio"]:.2f}',
                (max(high, 1), i),
                xytext=(6, 0),
                textcoords='offset points',
                va='center',
            )
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_yticks(range(len(rows)), [case_label(case) for case in rows])
        axis.set_ylim(most - 0.5, -0.5)
        axis.margins(x=0.1)
        timed = rows[0]['unit'] == 'seconds'
        axis.set_title(f'{title}: {"speed" if timed else "peak memory of training"}')
        axis.set_xlabel('speed-up over the baseline' if timed else 'fraction of the memory of the baseline')
    figure.legend(loc='lower left', ncols=len(KINDS), frameon=False, fontsize=10)
    return figure


def case_label(case: dict[str, Any]) -> str:
    shape = f'{case["batch"]} × {case["height"]} × {case["width"]}'
    return ', '.join(filter(None, (shape, case['dtype'] if case['dtype'] != 'fp32' else '', case['variant'])))


def draw_scale(plt: Any, rows: list[dict[str, Any]], title: str) -> Any:
    """Curves of time and memory per megapixel over the side of the image."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    sides = [row['side'] for row in rows]
    for axis, unit, factor in ((axes[0], 'seconds', 1e3), (axes[1], 'bytes', 1e-6)):
        for network, (name, colour) in NETWORKS.items():
            costs = [factor * row[network][unit] / row['megapixels'] for row in rows]
            axis.plot(sides, costs, 'o-', color=colour, label=name)
        axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
        axis.set_xticks(sides)
        axis.set_xlabel('side of the image, pixels')
        axis.grid(axis='y', alpha=0.3)
    axes[0].set_ylabel('ms per megapixel')
    axes[1].set_ylabel('peak MB per megapixel')
    axes[0].set_title(f'{title}: time of inference')
    axes[1].set_title('Memory of inference')
    axes[0].legend(frameon=False)
    return figure


def draw_peers(plt: Any, rows: list[dict[str, Any]], title: str) -> Any:
    """Bars of images per second, with the reported accuracy."""
    batches = list(rows[0]['images_per_second'])
    size = (6.5 * len(batches), 1.6 + 0.5 * len(rows))
    figure, axes = plt.subplots(1, len(batches), figsize=size, sharey=True, squeeze=False)
    rows = sorted(rows, key=lambda row: -row['images_per_second'][batches[-1]])
    colours = [
        ORANGE if 'deployed' in row['name'] else BLUE if row['name'].startswith('EMOv2') else GREY
        for row in rows
    ]
    for axis, batch in zip(axes[0], batches):
        speeds = [row['images_per_second'][batch] for row in rows]
        bars = axis.barh(range(len(rows)), speeds, 0.7, color=colours)
        axis.bar_label(bars, [f'{speed:.1f}' for speed in speeds], padding=5)
        axis.margins(x=0.12)
        axis.set_title(f'EMOv2 and others, batch {batch}')
        axis.set_xlabel('images per second, fp32')
    axes[0][0].set_yticks(range(len(rows)), [peer_label(row) for row in rows])
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def peer_label(row: dict[str, Any]) -> str:
    top1 = f', reported {row["top1"]:.1f} %' if row['top1'] else ''
    return f'{row["name"]}\n{row["side"]} × {row["side"]}{top1}'


if __name__ == '__main__':
    out = Path(sys.argv[1])
    saved = json.loads((out / 'benchmark.json').read_text())
    for shown in tables(saved):
        Console().print(shown)
    draw(saved, out)
