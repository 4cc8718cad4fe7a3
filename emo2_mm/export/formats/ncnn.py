"""ncnn, for phones: converted by the program in the package pnnx, from ONNX."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import predict
from ..end_to_end import Unsupported
from ..onnx_network import trace
from .base import Format, Source

# Runs a model on a black image; its arguments are predict.py, the folder and the entry of model.json.
TRY = """
import json, pathlib, runpy, sys, numpy
entry = json.loads(sys.argv[3])
image = numpy.zeros(entry['input']['shape'], entry['input']['dtype'])
runtime = runpy.run_path(sys.argv[1])['Ncnn'](pathlib.Path(sys.argv[2]), entry, 1)
runtime(image, [output['name'] for output in entry['outputs']])
"""


def find_pnnx() -> str:
    """Path of the program; its Python package is not imported, for that one needs a torch of its own."""
    spec = importlib.util.find_spec('pnnx')
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('No module named pnnx')
    return str(Path(spec.submodule_search_locations[0]) / 'pnnx')


def write_ncnn(source: Source, folder: Path, precision: str) -> list[str]:
    """``model.ncnn.param`` and ``model.ncnn.bin``, or ``model-fp16.ncnn.param`` ..."""
    if len(source.example) != 1:
        raise Unsupported('it takes one image at a time; leave out --batch')
    network, example = source.planar()
    graph = trace(network, example, source.outputs, {}, source.opset)
    stem = 'model' if precision == 'fp32' else f'model-{precision}'
    names = {f'model.ncnn.{end}': f'{stem}.ncnn.{end}' for end in ('param', 'bin')}
    with TemporaryDirectory(dir=source.folder) as work:  # pnnx writes eight files next to its input
        Path(work, 'model.onnx').write_bytes(graph.SerializeToString())
        shape = ','.join(map(str, example.shape))
        command = [find_pnnx(), 'model.onnx', f'inputshape=[{shape}]', f'fp16={int(precision == "fp16")}']
        result = subprocess.run(command, cwd=work, capture_output=True, text=True)
        log = result.stdout + result.stderr
        # What it cannot convert it writes nevertheless, as a layer that ncnn refuses.
        unknown = sorted(set(re.findall(r'^ignore (\S+) \S+ param ', log, re.MULTILINE)))
        if unknown:
            raise Unsupported(f'ncnn has no layer for {", ".join(unknown)}')
        if result.returncode or not all(Path(work, name).is_file() for name in names):
            raise RuntimeError(f'pnnx ends with {result.returncode}: {" ".join(log[-300:].split())}')
        for written, name in names.items():
            shutil.move(str(Path(work, written)), folder / name)
    files = list(names.values())
    for packing in (False, True):  # without is faster, but some dilated convolutions then end the process
        result = _try(source, folder, dict(files=files, precision=precision, x86_packing=packing))
        if not result.returncode:
            source.notes['x86_packing'] = packing
            return files
    message = ' '.join(result.stderr[-300:].split())
    raise Unsupported(f'ncnn ends with {result.returncode} when it runs the model: {message}')


def _try(source: Source, folder: Path, entry: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a model in a process of its own, which survives it if ncnn crashes."""
    with torch.no_grad():
        outputs = zip(source.outputs, source.network(source.example))
    entry['outputs'] = [dict(name=name, shape=list(y.shape)) for name, y in outputs]
    entry['input'] = dict(shape=list(source.example.shape), dtype=str(source.example.numpy().dtype))
    command = [sys.executable, '-c', TRY, predict.__file__, str(folder), json.dumps(entry)]
    return subprocess.run(command, capture_output=True, text=True)


FORMAT = Format(
    'ncnn',
    'ncnn',
    ('onnx', 'ncnn', 'pnnx'),
    'onnx ncnn pnnx',
    'ncnn',
    write_ncnn,
    precisions=('fp32', 'fp16'),
    argmax=False,
    limits=(
        'one image at a time; in the file the input is called in0 and the outputs out0, out1, ... in this '
        'order, without the axis of the batch',
        'pixels go in as ncnn::Mat::from_pixels gives them, in the order of colors above',
        'fp32 as measured needs opt.use_fp16_packed, opt.use_fp16_storage and opt.use_fp16_arithmetic off',
    ),
)
