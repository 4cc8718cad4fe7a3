"""The folder that is handed to the developer of an app: model files, model.json, predict.py, README.md."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from ..errors import UserError
from . import predict

RESULTS = {
    'detection': '`objects`: `class`, `label`, `score` and `box` (x1, y1, x2, y2 in pixels of the image)',
    'instance segmentation': '`objects`: `class`, `label`, `score`, `box` (x1, y1, x2, y2 in pixels of the '
    "image) and `mask` (COCO's run-length encoding)",
    'segmentation': '`segments`: `class`, `label` and `share` of the pixels; `map`: the class of each pixel',
    'classification': '`classes`: the best five with `class`, `label` and `score`',
}


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` at the end, in place of an earlier bundle, if nothing fails.

    Raises:
        UserError: If ``out`` exists and is something else than a bundle or an empty folder.
    """
    out = out.resolve()
    if out.exists():
        if not out.is_dir():
            raise UserError(f'--out is {out}: a file; give a folder')
        if any(out.iterdir()) and not (out / 'model.json').is_file():
            raise UserError(f'--out is {out}: a folder with other files in it; give a new one')
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    part.chmod(0o777 & ~_umask())
    try:
        yield part
        old = None
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent)) / out.name
            out.rename(old)
        part.rename(out)
        if old:
            shutil.rmtree(old.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_metadata(folder: Path, meta: dict[str, Any], models: dict[str, dict[str, Any]]) -> None:
    """Write model.json."""
    content = dict(schema=predict.SCHEMA, **meta, models=models)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / 'model.json').write_text(text + '\n', encoding='utf-8')


def write_program(folder: Path) -> None:
    """Copy predict.py."""
    shutil.copyfile(predict.__file__, folder / 'predict.py')


def input_words(meta: dict[str, Any], entry: dict[str, Any]) -> str:
    """What a model takes, in words."""
    given = entry['input']
    size = ' x '.join(map(str, given['shape']))
    if given['dtype'] == 'uint8':
        return f'`{given["name"]}`, {size} uint8, {meta["color_order"]}: pixels as they are'
    return f'`{given["name"]}`, {size} float32, {meta["color_order"]}: (pixel - mean) / std, see model.json'


def _alike(models: dict[str, dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Names of the models with the same input, outputs and limits, and one of them."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, entry in models.items():
        key = json.dumps([entry[part] for part in ('input', 'outputs', 'limits')])
        found.setdefault(key, ([], entry))[0].append(name)
    return list(found.values())


def _web_lines(folder: Path) -> list[str]:
    """How to open the page of a bundle."""
    size = (folder / 'web/ort/ort-wasm-simd-threaded.wasm').stat().st_size
    return [
        '## In a browser',
        '',
        '```bash',
        'python -m http.server 8000  # in this folder; any web server will do',
        '```',
        '',
        "Open `http://localhost:8000`, or `http://ADDRESS:8000` with this computer's address on a phone in "
        f'the same network. The page loads the model and {size / 1e6:.0f} MB of WebAssembly from here and '
        'nothing from elsewhere; pictures stay on the device. Browsers give live video only to `https` and '
        '`localhost`; elsewhere the button Camera of a phone takes a photo. The model runs in one thread; in '
        'up to four if the server sends `Cross-Origin-Opener-Policy: same-origin` and '
        '`Cross-Origin-Embedder-Policy: require-corp`.',
        '',
    ]


def write_readme(
    folder: Path,
    meta: dict[str, Any],
    models: dict[str, dict[str, Any]],
    notes: list[str],
    picture: str | None,
) -> None:
    """Write README.md: how to run the models, what comes out, and what was measured."""
    first = next(iter(models.values()))
    decoded = first['answers'] in predict.DECODED
    installs = sorted({entry['install'] for entry in models.values()})
    lines = [
        f'# {meta["name"]}',
        '',
        f'EMOv2, {meta["task"]}, exported by emo2_mm {meta["versions"]["emo2_mm"]}.',
        '',
    ]
    lines += ['## Run it', '', '```bash', f'pip install numpy pillow {first["install"]}']
    if decoded:
        lines += ['python predict.py IMAGE_OR_FOLDER --out predictions']
    lines += ['```', '']
    if decoded:
        lines += [
            'writes pictures to `predictions/vis` and JSON to `predictions/preds`. In Python:',
            '',
            '```python',
            'from predict import Model',
            '',
            "model = Model('.')  # this folder",
            "found = model('photo.jpg')  # or an array (H, W, 3) uint8 in RGB",
            '```',
            '',
            f'`found` has `width`, `height` and {RESULTS[meta["task"]]}.',
            '',
        ]
    else:
        lines += [
            'These models give maps that `predict.py` does not decode:',
            '',
            '```python',
            'from predict import Model',
            '',
            "model = Model('.')  # this folder",
            "outputs = model.run(model.prepare('photo.jpg').array)  # arrays by name",
            '```',
            '',
        ]
    if any(entry['runtime'] == 'web' for entry in models.values()):
        lines += _web_lines(folder)
    if picture:
        lines += [f'![An example]({picture})', '']
    if len(installs) > 1:
        lines += ['`--model NAME` chooses another of the models below; then install its runtime.', '']
    lines += ['## Models', '']
    header = ['name', 'files', 'MB', 'error', 'ms', 'accuracy', 'pip install']
    lines += [f'| {" | ".join(header)} |', '| --- | --- | ---: | ---: | ---: | ---: | --- |']
    for name, entry in models.items():
        ms = '' if entry.get('ms') is None else f'{entry["ms"]:.1f}'
        accuracy = entry.get('accuracy', {}).get('value', '')
        cells = [name, ', '.join(entry['files']), f'{entry["MB"]:.2f}', entry['error'], ms, str(accuracy)]
        lines.append(f'| {" | ".join([*cells, entry["install"]])} |')
    lines += ['', *[line for note in notes for line in (note, '')], '## Input and outputs', '']
    for names, entry in _alike(models):
        lines += [f'{", ".join(f"`{name}`" for name in names)}: {input_words(meta, entry)}. Out come', '']
        for output in entry['outputs']:
            meaning = f': {output["meaning"]}' if output.get('meaning') else ''
            shape = ' x '.join(map(str, output['shape']))
            lines.append(f'- `{output["name"]}`, {shape} {output["dtype"]}{meaning}')
        lines += [f'- Limit: {limit}.' for limit in entry.get('limits', [])] + ['']
    lines += [
        '`preprocess` in model.json says how an image becomes the input; `predict.py` does so, and brings '
        'boxes and class maps back to the size of the image.',
        '',
    ]
    (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
