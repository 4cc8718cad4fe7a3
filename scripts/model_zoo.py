"""Write MODEL_ZOO.md and its plot from the metafiles, or the measured sizes into the metafiles."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
INDEX = 'model-index.yml'
PAGE = 'MODEL_ZOO.md'
PLOT = 'docs/images/model_zoo.svg'

# Above each metafile, for whoever edits one by hand.
NOTE = """\
# What is called "Reported" are figures of the authors (arXiv 2412.06674): they were not reproduced here.
# Parameters, FLOPs and Input Size were measured here: `python scripts/model_zoo.py --measure` writes them.
"""

TEMPLATE = """\
# Model zoo

<!-- Written by `python scripts/model_zoo.py` from configs/*/metafile.yml: edit those. -->

Two kinds of figures, in columns of their own:

- **reported** by the authors with the paper ([arXiv 2412.06674](https://arxiv.org/abs/2412.06674)). No
  accuracy on this page was reproduced by this project.
- **measured** on this project's configs by `python tools/get_flops.py CONFIG`, for one image of the given
  size. FLOPs are multiply-adds.

![Reported accuracy over measured parameters]({plot})

*Accuracy as reported by the authors, over the parameters of the whole model at inference, as measured here.*

With 8 GPUs, at the published batch size (`--auto-scale-lr` adapts the learning rate to another number):

```bash
tools/dist_train.sh CONFIG 8
tools/dist_test.sh CONFIG CHECKPOINT 8
```

The authors publish ImageNet weights of 1M, 2M and 5M only; this project hosts none. The links below are those
of the authors' page and were not tried here; [their licence](README.md#weights) is up to the authors.
Detectors and segmentors start from the named file in `checkpoints/`. Weights of 20M are not published: its
configs start from random weights and cannot reproduce the reported results, which used pretrained ones.

## Classification on ImageNet-1K

{cls}

Reported parameters are truncated after the first decimal. The last model was trained on images of 512 x 512
with windows of 8; its weights are `EMOv2_5M_512_KD.pth`, on [the authors' page](https://github.com/zhangzjn/EMOv2).
That page first gave its accuracy for 224 x 224 and 1035 M, as above, and later for 512 x 512 and 5627 M.
At 512 x 512 it has 5627.332 M:

```bash
python tools/get_flops.py configs/cls/emo2_5m.py --shape 512 --cfg-options model.backbone.window_size=8
```

## Detection on COCO 2017

{det}

The authors call SSDLite's 320 x 320 "300". Their FLOPs of RetinaNet and Mask R-CNN are a mean over images of
several sizes; at 800 x 1280 they are {retinanet} and {mask_rcnn} times as high. For Mask R-CNN the table has
the box mAP; the only known mask mAP is {mask_map} for 5M, from the authors' log.

## Segmentation on ADE20K

{seg}

Parameters are those at inference; in brackets, with the auxiliary head that is used in training only.

## Without a published result

{unpublished}
"""


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def write(path: Path, metafile: dict[str, Any]) -> None:
    path.write_text(NOTE + yaml.safe_dump(metafile, sort_keys=False, width=110), encoding='utf-8')


def metafiles() -> dict[Path, dict[str, Any]]:
    return {ROOT / name: read(ROOT / name) for name in read(ROOT / INDEX)['Import']}


def models() -> list[dict[str, Any]]:
    """Entries of all metafiles, those without a published result included."""
    return [model for metafile in metafiles().values() for model in metafile['Models']]


def metrics(model: dict[str, Any]) -> dict[str, float]:
    """Reported figures by name, the one that the plot shows first; none if nothing is published."""
    return {name: value for result in model.get('Results', []) for name, value in result['Metrics'].items()}


def inference_params(model: dict[str, Any]) -> int:
    meta = model['Metadata']
    return meta.get('Inference Parameters', meta['Parameters'])


def measure() -> None:
    """Count every model as ``tools/get_flops.py`` does and write the sizes into the metafiles."""
    from emo2_mm.analysis import complexity  # needs torch and the libraries, unlike the rest

    for path, metafile in metafiles().items():
        for model in metafile['Models']:
            with redirect_stdout(sys.stderr):  # the frameworks' own messages
                sizes = complexity.count(str(ROOT / model['Config']))
            print(f'{model["Config"]}: {sizes["params"]} parameters, {sizes["flops"]} FLOPs', flush=True)
            model['Metadata'].pop('Inference Parameters', None)
            model['Metadata'].update(measured(sizes))
        write(path, metafile)


def measured(sizes: dict[str, Any]) -> dict[str, Any]:
    """Name the sizes of ``complexity.count`` as metafiles do."""
    height, width = sizes['shape']
    found = {'Parameters': sizes['params'], 'FLOPs': sizes['flops'], 'Input Size': f'{height} x {width}'}
    if sizes['params_inference'] != sizes['params']:
        found['Inference Parameters'] = sizes['params_inference']
    return found


def variant(model: dict[str, Any]) -> str:
    """What tells a model from those of the same data set and other size: its method or recipe."""
    meta = model['Metadata']
    _, *method = meta['Architecture']
    if 'SSDLite' in method:
        method.append(meta['Input Size'].split()[0])
    return ' '.join(method) or ', '.join(meta.get('Training Techniques', ['plain']))


def row(model: dict[str, Any]) -> dict[str, str]:
    """Cells of a model's table row by heading."""
    meta = model['Metadata']
    unit, factor = ('G', 1e9) if 'Reported FLOPs (G)' in meta else ('M', 1e6)
    params = f'{inference_params(model) / 1e6:.3f} M'
    if 'Inference Parameters' in meta:
        params += f' ({meta["Parameters"] / 1e6:.3f} M)'
    cells = {'Config': f'[{model["Name"]}]({model["Config"]})'}
    if 'Results' in model:
        if '/cls/' in model['Config']:
            cells['Recipe'] = variant(model).lower()
        (name, value), *others = model['Results'][0]['Metrics'].items()
        cells[name] = f'**{value}**'
        if others:
            names = ' / '.join(name.split()[-1] for name, _ in others)
            cells[f'Reported {names}'] = ' / '.join(str(value) for _, value in others)
        cells['Reported parameters'] = f'{meta["Reported Parameters (M)"]} M'
        cells['Reported FLOPs'] = f'{meta[f"Reported FLOPs ({unit})"]} {unit}'
    cells['Measured parameters'] = params
    cells['Measured FLOPs'] = f'{meta["FLOPs"] / factor:.3f} {unit}'
    cells['Image'] = meta['Input Size']
    if 'Initial Weights' in meta:
        cells['Starts from'] = meta['Initial Weights']
    elif 'Results' in model:
        url = model.get('Weights')
        cells['Weights'] = f'[{url.split("/")[-1]}]({url})' if url else 'see below'
    return cells


def table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ['---'] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def page() -> str:
    """Text of MODEL_ZOO.md."""
    everything = models()
    published = [model for model in everything if 'Results' in model]
    tables = {
        task: table([row(model) for model in published if model['Config'].startswith(f'configs/{task}/')])
        for task in ('cls', 'det', 'seg')
    }

    def ratios(method: str) -> str:
        metas = [model['Metadata'] for model in published if variant(model) == method]
        found = sorted(meta['FLOPs'] / 1e9 / meta['Reported FLOPs (G)'] for meta in metas)
        return f'{found[0]:.2f} - {found[-1]:.2f}'

    (mask_map,) = (m['Reported mask mAP'] for m in map(metrics, published) if 'Reported mask mAP' in m)
    return TEMPLATE.format(
        plot=PLOT,
        retinanet=ratios('RetinaNet'),
        mask_rcnn=ratios('Mask R-CNN'),
        mask_map=mask_map,
        unpublished=table([row(model) for model in everything if 'Results' not in model]),
        **tables,
    )


def curves() -> dict[str, dict[str, list[tuple[str, float, float]]]]:
    """What the plot shows, by data set and variant: size, parameters in millions and accuracy of models."""
    found: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    for model in models():
        if 'Results' in model:
            size = model['Metadata']['Architecture'][0].split('-')[1]
            accuracy, *_ = metrics(model).values()
            points = found.setdefault(model['Results'][0]['Dataset'], {}).setdefault(variant(model), [])
            points.append((size, inference_params(model) / 1e6, accuracy))
    return found


def fingerprint() -> str:
    """Stand for what the plot shows, within its file: the file's bytes depend on matplotlib's version."""
    return hashlib.sha256(json.dumps(curves()).encode()).hexdigest()


# Of each data set: title, y axis, limits of both axes, the curve whose points are named and where.
PANELS = {
    'ImageNet-1k': ('Classification', 'ImageNet-1K top-1 (%)', (1.2, 6), (71, 84), 'plain', (4, -20)),
    'COCO': ('Detection', 'COCO box mAP', (1.3, 95), (20, 46), 'SSDLite 320', (4, -20)),
    'ADE20K': ('Segmentation', 'ADE20K mIoU (%)', (0.95, 150), (32, 49), 'SegFormer', (-9, 9)),
}

# Of each curve: label, colour (Okabe and Ito's, which the colour-blind tell apart), marker, and where the
# label stands: beside which point, how many points (1/72 inch) off it, aligned how.
STYLES = {
    'plain': ('plain', '#0072B2', 'o', 1, (16, -6), 'left'),
    'Knowledge Distillation': ('distilled', '#D55E00', 's', 1, (-12, 4), 'right'),
    'Knowledge Distillation, 512 x 512 Images': (
        'distilled, trained at 512',
        '#009E73',
        'D',
        0,
        (-12, -5),
        'right',
    ),
    'RetinaNet': ('RetinaNet', '#0072B2', 'o', 2, (-11, 5), 'right'),
    'Mask R-CNN': ('Mask R-CNN', '#D55E00', 's', 1, (13, -5), 'left'),
    'SSDLite 512': ('SSDLite 512', '#009E73', 'D', 2, (-9, 6), 'right'),
    'SSDLite 320': ('SSDLite 320', '#CC79A7', '^', -1, (13, -5), 'left'),
    'SegFormer': ('SegFormer', '#0072B2', 'o', -1, (-36, 7), 'right'),
    'Semantic FPN': ('Semantic FPN', '#009E73', 'D', -1, (12, -6), 'left'),
    'PSPNet': ('PSPNet', '#D55E00', 's', 0, (-12, -5), 'right'),
    'DeepLabv3': ('DeepLabv3', '#CC79A7', '^', -1, (12, -6), 'left'),
}


def draw(path: Path) -> Any:
    """Draw reported accuracy over measured parameters, a panel for each data set; return the figure."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    style = {'font.size': 14, 'axes.spines.top': False, 'axes.spines.right': False, 'svg.hashsalt': 'zoo'}
    with plt.rc_context(style):
        fig, axes = plt.subplots(1, 3, figsize=(16, 5.6))
        for ax, (data, variants) in zip(axes, curves().items()):
            title, accuracy, x_limits, y_limits, named, name_offset = PANELS[data]
            for name, points in variants.items():
                label, colour, marker, beside, offset, align = STYLES[name]
                xy = [point[1:] for point in points]
                ax.plot(*zip(*xy), color=colour, marker=marker, markersize=9, linewidth=2.5)
                bold = dict(color=colour, ha=align, weight='bold')
                ax.annotate(label, xy[beside], offset, textcoords='offset points', **bold)
                if name == named:
                    small = dict(color='0.35', ha='center', size=12)
                    for size, *at in points:
                        ax.annotate(size, at, name_offset, textcoords='offset points', **small)
            ax.set_title(title, loc='left', size=19, weight='bold', pad=32)
            ax.text(0, 1.035, f'{accuracy}, reported', transform=ax.transAxes, color='0.35')
            ax.set(xscale='log', xlim=x_limits, ylim=y_limits)
            ax.set_xlabel('parameters (M), measured', color='0.35')
            ticks = [x for x in (1, 2, 3, 5, 10, 20, 50, 100) if x_limits[0] <= x <= x_limits[1]]
            ax.set_xticks(ticks, [str(x) for x in ticks])
            ax.set_xticks([], minor=True)
            ax.grid(color='0.92')
            ax.set_axisbelow(True)
        fig.tight_layout(w_pad=3)
        fig.savefig(path, metadata={'Date': None, 'Description': f'shows {fingerprint()}'})
        plt.close(fig)
    return fig


def drift() -> list[str]:
    """Name what no longer says what the metafiles say."""
    page_file, plot_file = ROOT / PAGE, ROOT / PLOT
    stale = []
    if not page_file.exists() or page_file.read_text(encoding='utf-8') != page():
        stale.append(PAGE)
    if not plot_file.exists() or fingerprint() not in plot_file.read_text(encoding='utf-8'):
        stale.append(PLOT)
    return stale


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--check', action='store_true', help='write nothing; exit with 1 if it would')
    what.add_argument(
        '--measure', action='store_true', help='count all models first, which takes some minutes'
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.check:
        stale = drift()
        for name in stale:
            print(f'error: {name} differs from the metafiles; run scripts/model_zoo.py', file=sys.stderr)
        return 1 if stale else 0
    if args.measure:
        measure()
    (ROOT / PAGE).write_text(page(), encoding='utf-8')
    draw(ROOT / PLOT)
    print(f'wrote {PAGE} and {PLOT}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
