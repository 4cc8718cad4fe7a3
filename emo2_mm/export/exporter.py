"""Export a model of a config to a bundle: convert it, compare it with torch, measure it, write it down."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from torch import Tensor, nn

from ..analysis.complexity import checked, default_shape
from ..config import parse_options
from ..errors import UserError
from . import predict
from .accuracy import evaluate, headline, validation_images
from .bundle import building, write_metadata, write_program, write_readme
from .compare import LIMITS, compare
from .end_to_end import MEANINGS, EndToEnd, Normalize, Unsupported
from .environment import Runtime, runtimes
from .formats import FORMATS, Format, Source, find_formats
from .int8 import find_images
from .loading import Loaded, Options, folded, load
from .metadata import describe
from .onnx_network import replace
from .report import is_checked, markdown_rows, print_rows, table_rows, time_models

ODD_SIZES = [(97, 64), (33, 250)]  # also compared with --dynamic; windows are padded, or larger than the map
SAMPLES = 4  # pictures on which formats are compared with torch


@dataclass
class Exported:
    """What was written in one format and precision.

    Attributes:
        entry: Of model.json.
        run: Computes the outputs of :attr:`sample`; None if the format cannot run here.
        sample: An input.
    """

    entry: dict[str, Any]
    run: Callable[[], Any] | None
    sample: np.ndarray


def choose_answers(task: str, form: Format, options: Options) -> str:
    """What a model of a task gives in a format: see :class:`EndToEnd`."""
    if options.backbone:
        return 'features'
    if options.raw:
        return 'raw'
    if task in ('detection', 'instance segmentation'):
        return 'detections' if form.nms else 'boxes'
    if task == 'segmentation':
        return 'map' if form.argmax else 'logits'
    return 'probabilities'


class Exporter:
    """Builds networks for the formats, and runs what they have written."""

    def __init__(
        self, loaded: Loaded, meta: dict[str, Any], shape: tuple[int, int], options: Options, work: Path
    ) -> None:
        self.loaded, self.meta, self.shape, self.options, self.work = loaded, meta, shape, options, work
        self.folded = folded(loaded.model)
        self.pictures: list[np.ndarray] = []
        self.calibration: list[Path] = []
        self._sources: dict[Any, tuple[Source, EndToEnd]] = {}

    def network(self, model: nn.Module, answers: str, dtype: str) -> EndToEnd:
        """``model`` from images to answers; it is used, not copied."""
        divisor = self.meta['size_divisor'] if self.options.dynamic else 1
        normalize = Normalize(self.meta['mean'], self.meta['std'], divisor) if dtype == 'uint8' else None
        return EndToEnd(model, self.loaded.scope, answers, normalize, self.options.dynamic).eval()

    def example(self, dtype: str, batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
        """Noise of the kind that a network takes."""
        generator = torch.Generator().manual_seed(seed)
        if dtype == 'uint8':
            return torch.randint(0, 256, (batch, *size, 3), generator=generator, dtype=torch.uint8)
        return torch.randn(batch, 3, *size, generator=generator)

    def source(self, form: Format) -> tuple[Source, EndToEnd]:
        """What a format converts, and the same in torch as it was loaded."""
        options = self.options
        answers = choose_answers(self.meta['task'], form, options)
        dtype = 'float32' if options.float_input else form.dtype
        free = form.free_batch and options.batch is None
        key = answers, dtype, free
        if key not in self._sources:
            reference = self.network(self.loaded.model, answers, dtype)
            if reference.rules:
                self.meta['nms'] = reference.rules
            network = self.network(deepcopy(self.folded), answers, dtype)
            replace(network, self.loaded.scope, options.dynamic)
            example = self.example(dtype, 2 if free else options.batch or 1, self.shape)
            with torch.no_grad():
                outputs = network(example)
            axes = self._axes(network, outputs, dtype, free)
            folder = self.work / f'{answers}-{dtype}-{free}'
            folder.mkdir()
            source = Source(network, example, network.names, axes, self.meta, folder, opset=options.opset)
            source.picture = next(iter(self.pictures), None)
            self._sources[key] = source, reference
        return self._sources[key]

    def _axes(
        self, network: EndToEnd, outputs: tuple[Tensor, ...], dtype: str, free: bool
    ) -> dict[str, dict[int, str]]:
        names = ['image', *network.names]
        axes: dict[str, dict[int, str]] = {name: {0: 'batch'} if free else {} for name in names}
        if self.options.dynamic:
            first = 1 if dtype == 'uint8' else 2
            axes['image'].update({first: 'height', first + 1: 'width'})
            for name, y in zip(network.names, outputs):
                if name == 'map' or (name == 'logits' and network.answers == 'raw' and y.ndim == 4):
                    axes[name].update({y.ndim - 2: 'height', y.ndim - 1: 'width'})
                elif y.ndim == 4 and name != 'masks':
                    axes[name].update({2: f'{name}_height', 3: f'{name}_width'})
                elif name in ('boxes', 'scores'):
                    axes[name].update({1: 'anchors'})
        return {name: found for name, found in axes.items() if found}

    def entry(self, form: Format, precision: str, files: list[str], source: Source) -> dict[str, Any]:
        """The model's entry in model.json."""
        dtype = 'uint8' if source.example.dtype == torch.uint8 else 'float32'

        def shape(name: str, y: Tensor) -> list[int | str]:
            free = source.axes.get(name, {})
            return [free.get(i, int(n)) for i, n in enumerate(y.shape)]

        with torch.no_grad():
            outputs = dict(zip(source.outputs, source.network(source.example)))
        return {
            'runtime': form.name,
            'precision': precision,
            'files': files,
            'install': form.runtime,
            'answers': source.network.answers,
            'input': {
                'name': 'image',
                'dtype': dtype,
                'layout': 'NHWC' if dtype == 'uint8' else 'NCHW',
                'shape': shape('image', source.example),
                'normalized_inside': dtype == 'uint8',
            },
            'outputs': [
                {
                    'name': name,
                    'shape': shape(name, y),
                    'dtype': str(y.dtype).split('.')[-1],
                    'meaning': MEANINGS.get(name, ''),
                }
                for name, y in outputs.items()
            ],
            'levels': source.network.levels,
            'limits': list(form.limits),
        }

    def inputs(self, form: Format, entry: dict[str, Any]) -> list[np.ndarray]:
        """Inputs on which a format is compared: the pictures, noise, batches and, if free, odd sizes."""
        options, dtype = self.options, entry['input']['dtype']
        found = []
        batch = entry['input']['shape'][0]
        if not (options.raw and not self.meta['preprocess']) and self.pictures:
            for picture in self.pictures:
                array = predict.prepare(picture, self.meta, entry).array
                found.append(np.repeat(array, batch, axis=0) if isinstance(batch, int) else array)
        first = batch if isinstance(batch, int) else 3
        found.append(self.example(dtype, first, self.shape, seed=1).numpy())
        if options.dynamic:
            found += [
                self.example(dtype, 2 if batch == 'batch' else first, size).numpy() for size in ODD_SIZES
            ]
        return found

    def export(self, form: Format, precision: str, folder: Path) -> Exported:
        """Write, load and run a model, and compare it with torch.

        Raises:
            UserError: If the format cannot hold the model, or the outputs differ.
        """
        if self.options.dynamic and not form.dynamic:
            raise Unsupported('it takes images of one size; leave out --dynamic')
        source, reference = self.source(form)
        if precision == 'int8' and not source.calibration:
            dtype = 'uint8' if source.example.dtype == torch.uint8 else 'float32'
            layout = 'NHWC' if dtype == 'uint8' else 'NCHW'
            source.calibration = self.calibrate(dict(input=dict(dtype=dtype, layout=layout)))
        source.notes.clear()
        files = form.convert(source, folder, precision)
        entry = self.entry(form, precision, files, source)
        entry.update(source.notes)
        inputs = self.inputs(form, entry)
        entry['MB'] = round(sum(map(size_of, (folder / file for file in files))) / 1e6, 3)
        if form.check:
            entry['error'] = form.check(source, folder, files)
            return Exported(entry, None, inputs[0])
        if form.simulate:
            runtime = form.simulate(folder, entry)
        else:
            runtime = predict.RUNTIMES[form.name](folder, entry, torch.get_num_threads())
        names, error = source.outputs, 0.0
        for x in inputs:
            with torch.no_grad():
                expected = [y.numpy() for y in reference(torch.from_numpy(x))]
            error = max(error, compare(names, runtime(x, names), expected, LIMITS[precision]))
        entry['error'] = f'{error:.1e}'
        if form.simulate:
            entry['error'] += ' (interpreted, not run)'
            return Exported(entry, None, inputs[0])
        if isinstance(runtime, Runtime):
            return Exported(entry, lambda: runtime.repeat(names), inputs[0])
        return Exported(entry, lambda: runtime(inputs[0], names), inputs[0])

    def calibrate(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """Inputs from the images of ``--quantize``; damaged files are skipped and named."""
        found, skipped = [], []
        for path in self.calibration:
            try:
                found.append(predict.prepare(predict.read_image(path), self.meta, entry).array)
            except ValueError as error:
                skipped.append(f'{path.name} ({str(error).split("(")[-1].rstrip(")")})')
        if skipped:
            print(f'skipped, cannot be read: {", ".join(skipped)}', file=sys.stderr)
            self.calibration = [p for p in self.calibration if not any(s.startswith(p.name) for s in skipped)]
        if not found:
            raise UserError(f'--quantize {self.options.quantize}: none of its images can be read')
        return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob('*') if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def sample_pictures(cfg: Config, loaded: Loaded, quantize: Sequence[Path]) -> list[np.ndarray]:
    """Pictures to compare on: of ``--quantize``, else of the config's validation data, else drawn ones."""
    paths = list(quantize) or (validation_images(cfg) if loaded.data else [])
    found = []
    for path in paths[:: max(1, len(paths) // SAMPLES)]:
        try:
            found.append(predict.read_image(path))
        except (OSError, ValueError):
            continue  # calibration names it
        if len(found) == SAMPLES:
            break
    if not found:
        y, x = np.mgrid[0:240, 0:320]
        waves = [127.5 + 127.5 * np.sin(a * x / 320 + b * y / 240) for a, b in ((9, 4), (-5, 11), (16, 16))]
        found.append(np.stack(waves, axis=-1).astype(np.uint8))
    return found


def check_options(options: Options) -> tuple[list[Format], list[Path]]:
    """Formats, and images of ``--quantize``, of options that go together.

    Raises:
        UserError: If they do not.
    """
    formats = find_formats(options.formats)
    if options.batch is not None and options.batch < 1:
        raise UserError(f'--batch is {options.batch}; give a positive number of images')
    if options.dynamic and options.shape:
        raise UserError('--shape and --dynamic exclude each other')
    if options.quantize and options.backbone:
        raise UserError('--quantize needs the whole model, to prepare images; leave out --backbone')
    for wanted, precision in ((options.quantize, 'int8'), (options.half, 'fp16')):
        if wanted and not any(precision in form.precisions for form in formats):
            able = ', '.join(name for name, form in FORMATS.items() if precision in form.precisions)
            raise UserError(
                f'none of --format {" ".join(f.name for f in formats)} has {precision}; {able} have'
            )
    return formats, find_images(options.quantize) if options.quantize else []


def export(config: str, checkpoint: str, options: Options) -> int:
    """Export a model into a bundle, and print how it compares with torch.

    Args:
        config: Config of MMPretrain, MMSegmentation or MMDetection.
        checkpoint: Its checkpoint; for a backbone alone also released weights.
        options: The rest.

    Returns:
        The exit code: 0; 1 if a model disagrees with torch or cannot be converted, then nothing is written; 2
        if the arguments cannot be used.
    """
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    try:
        formats, images = check_options(options)
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(parse_options(options.cfg_options))
        shape = checked(options.shape) if options.shape else default_shape(cfg)
        with redirect_stdout(io.StringIO()):  # what the libraries say of weights
            loaded = load(cfg, checkpoint, options.backbone)
        meta = describe(cfg, checkpoint, loaded, None if options.dynamic else shape, options)
        with redirect_stdout(io.StringIO()):  # what pycocotools says
            pictures = sample_pictures(cfg, loaded, images)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    try:
        pythons = {form.name: form.python() for form in formats}
        with tempfile.TemporaryDirectory() as work, building(options.out) as folder, runtimes(pythons):
            exporter = Exporter(loaded, meta, shape, options, Path(work))
            exporter.pictures, exporter.calibration = pictures, images
            build(cfg, exporter, formats, folder, console)
    except (UserError, RuntimeError, OSError) as error:
        print(f'error: {error}; nothing is written', file=sys.stderr)
        return 1
    console.print(f'{options.out}: {", ".join(p.name for p in sorted(options.out.iterdir()))}')
    return 0


def build(cfg: Config, exporter: Exporter, formats: list[Format], folder: Path, console: Console) -> None:
    """Write all models, measure them, and write what describes them."""
    options, meta = exporter.options, exporter.meta
    done: dict[str, Exported] = {}
    failed: dict[str, str] = {}
    for form in formats:
        for precision, wanted in (('fp32', True), ('fp16', options.half), ('int8', options.quantize)):
            if not wanted or precision not in form.precisions:
                continue
            name = form.name if precision == 'fp32' else f'{form.name}-{precision}'
            before = set(folder.iterdir())
            try:
                done[name] = exporter.export(form, precision, folder)
            except (UserError, RuntimeError, ValueError, OSError, ImportError) as error:
                message = ' '.join(str(error).split())
                skipped = options.formats == ['all'] and isinstance(error, Unsupported)
                if not (options.report or skipped):
                    raise UserError(f'{name}: {message}') from error
                failed[name] = message[:200]
                for path in set(folder.iterdir()) - before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                console.print(f'{name}: failed, {message}', markup=False)
            else:
                entry = done[name].entry
                console.print(f'{name}: error {entry["error"]}, {entry["MB"]:.2f} MB', markup=False)
    if not done:
        raise UserError('no format could be written')
    models = {name: each.entry for name, each in done.items()}
    write_program(folder)
    write_metadata(folder, meta, models)
    notes = []
    if options.quantize and not options.raw:
        notes += measure_accuracy(cfg, folder, models, console)
    torch_ms = time_all(exporter, formats[0], done)
    rows = table_rows(models, failed, torch_ms)
    print_rows(rows, console)
    picture = draw_example(exporter, folder, models)
    notes.insert(
        0,
        f'`error`: against torch, relative, the worst of {len(exporter.pictures)} pictures, noise and a '
        f'batch. `ms`: one image, {torch.get_num_threads()} thread(s), medians of runs in alternation on the '
        f'machine that exported; torch as loaded: {torch_ms} ms.',
    )
    write_metadata(folder, meta, models)
    write_readme(folder, meta, models, notes, picture)
    if options.report:
        (folder / 'report.md').write_text(markdown_rows(rows), encoding='utf-8')
        (folder / 'report.json').write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')


@torch.no_grad()
def time_all(exporter: Exporter, form: Format, done: dict[str, Exported]) -> float | None:
    """Time all models that run here, and torch as loaded, whose milliseconds are returned."""
    runs = {name: each.run for name, each in done.items() if each.run}
    if not runs:
        return None
    reference = exporter.source(form)[1]
    x = torch.from_numpy(next(each.sample for each in done.values() if each.run))
    found = time_models({'torch': lambda: reference(x), **runs})
    for name in runs:
        done[name].entry['ms'] = found[name]
    return found['torch']


def measure_accuracy(
    cfg: Config, folder: Path, models: dict[str, dict[str, Any]], console: Console
) -> list[str]:
    """Accuracy of all models on the validation data of the config, printed, and as lines for the README."""
    try:
        with redirect_stdout(io.StringIO()):
            found = evaluate(cfg, folder, [name for name, entry in models.items() if not is_checked(entry)])
    except FileNotFoundError as error:
        message = f'no accuracy: the validation data of {Path(cfg.filename).name} are not there ({error})'
        console.print(message, markup=False)
        return [message + '.']
    lines = []
    for name, metrics in found.items():
        key = headline(metrics)
        models[name]['accuracy'] = dict(metric=key, value=round(metrics[key], 4), all=metrics)
        lines.append(f'{name}: {key} {metrics[key]:.4g} on the validation data.')
        kept = models[name].get('float_layers')
        if kept:
            lines[-1] += f' Layers left in float: {", ".join(kept)}.'
        console.print(lines[-1], markup=False)
    return lines


def draw_example(exporter: Exporter, folder: Path, models: dict[str, Any]) -> str | None:
    """Draw what predict.py finds in a picture; the name of the file."""
    entry = next((e for e in models.values() if not is_checked(e)), None)
    if entry is None or entry['answers'] not in predict.DECODED:
        return None
    name = next(key for key, value in models.items() if value is entry)
    model = predict.Model(folder, name, torch.get_num_threads())
    picture = exporter.pictures[0]
    predict.draw(picture, model(picture), exporter.meta['palette']).save(folder / 'example.png')
    return 'example.png'
