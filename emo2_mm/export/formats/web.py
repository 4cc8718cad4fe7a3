"""A static folder with a page that runs the model in a browser, by onnxruntime-web."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from PIL import Image

from ..end_to_end import Unsupported
from .base import Format, Source
from .onnx import write_onnx

PAGE = Path(__file__).parents[1] / 'web'
PLACES = {'index.html': 'index.html', 'LICENSE-onnxruntime': 'web/ort/LICENSE'}  # the rest goes into web/
VERSION = '1.30.0'
VARIABLE = 'EMO2_MM_ONNXRUNTIME_WEB'
DEFAULT = '~/.cache/emo2_mm/web'
NEEDED = ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm')
WEBGPU = ('ort.webgpu.bundle.min.mjs', 'ort-wasm-simd-threaded.asyncify.wasm')  # copied if present
EXAMPLE = 1024  # most pixels of a side


def runtime_folder() -> Path:
    """The files of onnxruntime-web: of the environment variable, or where ``npm install`` puts them."""
    given = os.environ.get(VARIABLE)
    found = Path(given or f'{DEFAULT}/node_modules/onnxruntime-web').expanduser()
    return found / 'dist' if (found / 'dist').is_dir() else found


class Web(Format):
    """Also needs files that are no Python module."""

    def missing(self) -> list[str]:
        folder = runtime_folder()
        lost = [name for name in NEEDED if not (folder / name).is_file()]
        return super().missing() + ([f'{" and ".join(lost)} of onnxruntime-web in {folder}'] if lost else [])


def write_web(source: Source, folder: Path, precision: str) -> list[str]:
    """The ONNX model, the page, an example picture and the runtime."""
    if source.network.answers not in ('detections', 'probabilities', 'map'):
        raise Unsupported('its page shows boxes, classes or class maps; leave out --raw and --backbone')
    if source.example.ndim != 4 or source.example.shape[-1] != 3:
        raise Unsupported('its page gives uint8 pixels; leave out --float-input')
    if 0 not in source.axes.get('image', {}) and len(source.example) > 1:
        raise Unsupported('its page shows one picture at a time; leave out --batch')
    (folder / 'web/ort').mkdir(parents=True, exist_ok=True)
    for path in PAGE.iterdir():
        place = PLACES.get(path.name, f'web/{path.name}')
        shutil.copyfile(path, folder / place)
    for name in NEEDED + WEBGPU:
        path = runtime_folder() / name
        if path.is_file() or name in NEEDED:
            shutil.copyfile(path, folder / 'web/ort' / name)
    if source.picture is not None:
        picture = Image.fromarray(source.picture)
        picture.thumbnail((EXAMPLE, EXAMPLE))
        picture.save(folder / 'web/example.png')
    return [*write_onnx(source, folder, precision), 'index.html']


FORMAT = Web(
    'web',
    'browser',
    ('onnx', 'onnxruntime'),
    'onnx onnxruntime',
    'onnxruntime',
    write_web,
    precisions=('fp32', 'fp16', 'int8'),
    nms=True,
    dynamic=True,
    free_batch=True,
    environment=(
        'pip install onnx onnxruntime',
        f'npm install --prefix {DEFAULT} onnxruntime-web@{VERSION}',
        f'or set {VARIABLE} to a folder with the files of its dist/',
    ),
    limits=('error and ms are those of ONNX Runtime for Python with the same file, not those of a browser',),
)
