"""Export a model of a config to a bundle: convert it, compare it with torch, measure it, write it down."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import tempfile
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any, Callable, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..analysis.complexity import checked, default_shape
from ..analysis.timing import interleaved
from ..config import parse_options
from ..emov2 import EMOv2
from ..errors import UserError
from ..version import __version__
from ..weights.load import load_backbone_weights
from ..weights.read import read_checkpoint
from . import predict
from .accuracy import evaluate, headline, validation_images
from .bundle import building, write_metadata, write_program, write_readme
from .compare import LIMITS, compare
from .end_to_end import MEANINGS, EndToEnd, Normalize
from .formats import FORMATS, Format, Source, find_formats
from .int8 import find_images
from .onnx_network import replace
from .preprocess import preprocess_steps, preprocessor_settings

ODD_SIZES = [(97, 64), (33, 250)]  # also compared with --dynamic; windows are padded, or larger than the map
SAMPLES = 4  # pictures on which formats are compared with torch
SCORE_THR = 0.3  # of what predict.py draws


@dataclass
class Options:
    """What is exported, and how; see ``tools/export.py --help``.

    Attributes:
        formats: Names out of ``FORMATS``, or 'all'.
        out: Folder of the bundle.
        shape: Height and width of the model's input, or one number for both. Defaults to the size that the
            config tests at.
        dynamic: Take images of any size.
        batch: Take just this number of images. Defaults to any number where the format allows, else 1.
        quantize: Folder of images to calibrate int8 models on.
        half: Also write models with weights in half precision.
        opset: Of ONNX.
        backbone: Export the backbone alone.
        raw: Give the maps of the heads.
        float_input: Take normalized images.
        report: Write report.md and report.json into the bundle; a format that fails is listed and left out.
        cfg_options: ``KEY=VALUE`` texts that override settings of the config.
    """

    formats: list[str]
    out: Path
    shape: Sequence[int] | None = None
    dynamic: bool = False
    batch: int | None = None
    quantize: Path | None = None
    half: bool = False
    opset: int | None = None
    backbone: bool = False
    raw: bool = False
    float_input: bool = False
    report: bool = False
    cfg_options: list[str] | None = None


@dataclass
class Loaded:
    """A model in eval mode with its weights; ``meta`` is that of its data, None of a backbone alone."""

    model: nn.Module
    scope: str | None
    inferencer: Any = None
    data: dict[str, Any] | None = None


@dataclass
class Exported:
    """What was written in one format and precision."""

    format: Format
    precision: str
    entry: dict[str, Any]
    run: Callable[[np.ndarray], list[np.ndarray]]
    sample: np.ndarray
    size: float = 0.0  # MB
    error: float | None = None
    checked: str = ''
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.format.name if self.precision == 'fp32' else f'{self.format.name}-{self.precision}'


def check_classes(cfg: Config, checkpoint: str) -> None:
    """Raise ``UserError`` if a checkpoint or config names more or fewer classes than the model has."""
    from ..apis import find_names

    content = read_checkpoint(checkpoint)
    meta = content.get('meta') if isinstance(content, dict) else None
    known = meta.get('dataset_meta') if isinstance(meta, dict) else None
    count = len(find_names(None, cfg)['classes'])
    names = known.get('classes') if isinstance(known, dict) else None
    if isinstance(names, (list, tuple)) and len(names) != count:
        raise UserError(
            f'{checkpoint} names {len(names)} classes ({", ".join(map(str, names[:3]))} ...), but the model '
            f'of {cfg.filename} has {count}; give the config that it was trained with'
        )
    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    names = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(names, (list, tuple)) and len(names) != count:
        raise UserError(
            f'{cfg.filename}: metainfo of the data names {len(names)} classes, but num_classes of the model '
            f'is {count}; make them agree'
        )


def load(cfg: Config, checkpoint: str, backbone_only: bool) -> Loaded:
    """Build a config's model, or only its backbone, and load its weights, as data.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it cannot be read safely or does not hold the model's weights, or the backbone is not
            EMOv2.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise UserError(f'{cfg.filename}: it has no model with a backbone')
    if backbone_only:
        model, inferencer, data = MODELS.build({**cfg.model.backbone, 'init_cfg': None}), None, None
    else:
        from ..apis import init_inferencer  # needs OpenCV and the library of the config

        inferencer = init_inferencer(cfg, checkpoint, 'cpu')
        model = inferencer.model
        data = getattr(model, 'dataset_meta', None) or model._dataset_meta
    backbone = model if backbone_only else model.backbone
    if not isinstance(backbone, EMOv2):
        raise UserError(f'{cfg.filename}: its backbone is {type(backbone).__name__}, not EMOv2')
    if backbone_only:
        load_backbone_weights(model, checkpoint)
    else:
        check_classes(cfg, checkpoint)
    return Loaded(revert_sync_batchnorm(model).eval(), cfg.get('default_scope'), inferencer, data)


def folded(model: nn.Module) -> nn.Module:
    """A copy with the backbone's norms and layer scales folded into the weights next to them."""
    model = deepcopy(model)
    (model if isinstance(model, EMOv2) else model.backbone).switch_to_deploy()
    return model


def find_task(loaded: Loaded) -> str:
    if loaded.data is None:
        return 'backbone'
    if loaded.scope == 'mmdet':
        roi = getattr(loaded.model, 'roi_head', None)
        return 'instance segmentation' if roi is not None and roi.with_mask else 'detection'
    return {'mmseg': 'segmentation', 'mmpretrain': 'classification'}[str(loaded.scope)]


def describe(
    cfg: Config, checkpoint: str, loaded: Loaded, size: tuple[int, int] | None, options: Options
) -> dict[str, Any]:
    """Content of model.json but for ``models``: what someone who has only the bundle must know."""
    versions = {'emo2_mm': __version__, 'torch': torch.__version__}
    for name in ('mmengine', 'mmcv', cfg.get('default_scope')):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    backbone = cfg.model.backbone
    meta: dict[str, Any] = {
        'name': Path(cfg.filename).stem,
        'task': find_task(loaded),
        'classes': list(loaded.data['classes']) if loaded.data else [],
        'palette': [list(map(int, c)) for c in loaded.data['palette']] if loaded.data else [],
        **preprocessor_settings(cfg),
        'input_size': list(size) if size else None,  # height, width; None: any
        'preprocess': [],
        'arch': backbone.get('arch', '5m'),
        'window_size': backbone.get('window_size', 7),
        'config': Path(cfg.filename).name,
        'checkpoint': Path(checkpoint).name,
        'checkpoint_sha256': sha256(Path(checkpoint).expanduser().read_bytes()).hexdigest()
        if Path(checkpoint).expanduser().is_file()
        else None,
        'versions': versions,
    }
    try:
        meta['preprocess'] = preprocess_steps(cfg, size)
    except UserError:
        if not (options.raw or options.backbone):
            raise
    model = loaded.model
    if meta['task'] in ('detection', 'instance segmentation'):
        meta['score_thr'] = SCORE_THR
        head = model.rpn_head if getattr(model, 'with_rpn', False) else model.bbox_head
        if hasattr(head, 'prior_generator'):
            meta['strides'] = [list(pair) for pair in head.prior_generator.strides]
            if options.raw:
                meta.update(describe_anchors(head))
    if meta['task'] == 'instance segmentation':
        meta['mask_thr'] = float(model.test_cfg.rcnn.mask_thr_binary)
    if meta['task'] == 'segmentation':
        meta['align_corners'] = bool(model.align_corners)
        if model.decode_head.out_channels == 1:
            meta['binary_thr'] = float(model.decode_head.threshold)
    return meta


def describe_anchors(head: nn.Module) -> dict[str, Any]:
    """What turns the raw maps of a head into boxes: anchors, the coding of deltas, and the activation."""
    priors, coder = head.prior_generator, head.bbox_coder
    found: dict[str, Any] = dict(anchors='unknown', score_activation='unknown')
    if hasattr(priors, 'base_anchors'):
        found['anchors'] = {
            # of each level, at its first cell; the cell (x, y) adds (x, y, x, y) times the stride
            'base': [anchors.tolist() for anchors in priors.base_anchors],
            'order': 'rows of cells, cells, anchors of a cell; channels: anchor x class, or anchor x 4',
        }
        found['score_activation'] = 'sigmoid' if head.use_sigmoid_cls else 'softmax, the last is background'
    if type(coder).__name__ == 'DeltaXYWHBBoxCoder':
        found['box_coder'] = {
            'kind': 'center = anchor center + delta * anchor side, side = anchor side * exp(delta)',
            'means': list(coder.means),
            'stds': list(coder.stds),
            'largest_log_side': float(abs(np.log(16 / 1000))),
        }
    return found


def choose_answers(task: str, form: Format, options: Options) -> str:
    """What a model of a task gives in a format: see :class:`EndToEnd`."""
    if options.backbone:
        return 'features'
    if options.raw:
        return 'raw'
    if task in ('detection', 'instance segmentation'):
        return 'detections' if form.nms else 'boxes'
    return {'segmentation': 'map', 'classification': 'probabilities'}[task]


class Exporter:
    """Builds networks for the formats, and runs what they have written."""

    def __init__(
        self, loaded: Loaded, meta: dict[str, Any], shape: tuple[int, int], options: Options, work: Path
    ) -> None:
        self.loaded, self.meta, self.shape, self.options, self.work = loaded, meta, shape, options, work
        self.folded = folded(loaded.model)
        self.pictures: list[np.ndarray] = []
        self.calibration: list[Path] = []
        self._sources: dict[Any, tuple[Source, EndToEnd, list[int]]] = {}

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

    def source(self, form: Format) -> tuple[Source, EndToEnd, list[int]]:
        """What a format converts, the same in torch as it was loaded, and the anchors of each level."""
        options = self.options
        answers = choose_answers(self.meta['task'], form, options)
        dtype = 'float32' if options.float_input else form.dtype
        free = form.free_batch and options.batch is None
        key = answers, dtype, free
        if key not in self._sources:
            reference = self.network(self.loaded.model, answers, dtype)
            network = self.network(deepcopy(self.folded), answers, dtype)
            replace(network, self.loaded.scope, options.dynamic)
            example = self.example(dtype, 2 if free else options.batch or 1, self.shape)
            with torch.no_grad():
                outputs = network(example)
            axes = self._axes(network, outputs, dtype, free)
            folder = self.work / f'{answers}-{dtype}-{free}'
            folder.mkdir()
            source = Source(network, example, network.names, axes, self.meta, folder, opset=options.opset)
            self._sources[key] = source, reference, network.levels
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
            raise UserError(f'--format {form.name} takes images of one size; leave out --dynamic')
        source, reference, _ = self.source(form)
        if precision == 'int8':
            dtype = 'uint8' if source.example.dtype == torch.uint8 else 'float32'
            layout = 'NHWC' if dtype == 'uint8' else 'NCHW'
            source.calibration = self.calibrate(dict(input=dict(dtype=dtype, layout=layout)))
        files = form.convert(source, folder, precision)
        entry = self.entry(form, precision, files, source)
        entry.update(source.notes.pop(precision, {}))
        inputs = self.inputs(form, entry)
        size = sum((folder / file).stat().st_size for file in files) / 1e6
        if form.check:
            words = form.check(source, folder, files)
            entry['error'] = words
            return Exported(form, precision, entry, lambda x: [], inputs[0], size, None, words)
        runtime = predict.RUNTIMES[form.name](folder, entry, torch.get_num_threads())
        names = source.outputs

        def run(x: np.ndarray) -> list[np.ndarray]:
            return runtime(x, names)

        error = 0.0
        for x in inputs:
            with torch.no_grad():
                expected = [y.numpy() for y in reference(torch.from_numpy(x))]
            error = max(error, compare(names, run(x), expected, LIMITS[precision]))
        entry['error'] = f'{error:.1e}'
        return Exported(form, precision, entry, run, inputs[0], size, error)

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


@torch.no_grad()
def time_all(exporter: Exporter, done: list[Exported]) -> list[float]:
    """Time torch as loaded and all models in alternation; milliseconds, torch first."""
    timed = [each for each in done if not each.checked]
    if not timed:
        return []
    first = timed[0]
    reference = exporter.source(first.format)[1]
    x = torch.from_numpy(first.sample)
    runs: list[Callable[[], Any]] = [lambda: reference(x)]
    runs += [lambda each=each: each.run(each.sample) for each in timed]  # type: ignore[misc]
    rounds = list(interleaved(runs, 'cpu'))
    found = [1e3 * median(took[i] for took in rounds) for i in range(len(runs))]
    for each, ms in zip(timed, found[1:]):
        each.entry['ms'] = round(ms, 2)
    return found


def table_rows(done: list[Exported], failed: dict[str, str], torch_ms: float | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if torch_ms is not None:
        rows.append(dict(model='torch', ms=round(torch_ms, 2)))
    for each in done:
        rows.append(
            dict(
                model=each.name,
                MB=round(each.size, 2),
                error=each.entry['error'],
                ms=each.entry.get('ms'),
                nms='inside'
                if each.entry['answers'] == 'detections'
                else 'predict.py'
                if each.entry['answers'] == 'boxes'
                else '',
                accuracy=each.entry.get('accuracy', {}).get('value'),
            )
        )
    return rows + [dict(model=name, error=f'failed: {why}') for name, why in failed.items()]


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    columns = [
        key for key in ('model', 'MB', 'error', 'ms', 'nms', 'accuracy') if any(r.get(key) for r in rows)
    ]
    table = Table(*columns)
    for row in rows:
        table.add_row(*('' if row.get(key) is None else str(row[key]) for key in columns))
    console.print(table)


def markdown_rows(rows: list[dict[str, Any]]) -> str:
    columns = [
        key for key in ('model', 'MB', 'error', 'ms', 'nms', 'accuracy') if any(r.get(key) for r in rows)
    ]
    lines = ['| ' + ' | '.join(columns) + ' |', '| ' + ' | '.join('---' for _ in columns) + ' |']
    for row in rows:
        cells = ['' if row.get(key) is None else str(row[key]) for key in columns]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


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
        with tempfile.TemporaryDirectory() as work, building(options.out) as folder:
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
    done: list[Exported] = []
    failed: dict[str, str] = {}
    for form in formats:
        wanted = ['fp32'] + ['fp16'] * bool(options.half) + ['int8'] * bool(options.quantize)
        for precision in wanted:
            if precision not in form.precisions:
                continue
            name = form.name if precision == 'fp32' else f'{form.name}-{precision}'
            try:
                done.append(exporter.export(form, precision, folder))
            except Exception as error:
                if not options.report and not isinstance(error, (UserError, RuntimeError)):
                    raise
                message = ' '.join(str(error).split())
                if not options.report:
                    raise UserError(f'{name}: {message}') from error
                failed[name] = message[:200]
                console.print(f'{name}: failed, {message}', markup=False)
                continue
            console.print(f'{name}: error {done[-1].entry["error"]}, {done[-1].size:.2f} MB', markup=False)
    if not done:
        raise UserError('no format could be written')
    models = {each.name: each.entry for each in done}
    rules = next((getattr(s[0].network, 'rules', None) for s in exporter._sources.values()), None)
    if rules:
        meta['nms'] = rules
    write_program(folder)
    write_metadata(folder, meta, models)
    notes = []
    if options.quantize and not options.raw:
        notes += measure_accuracy(cfg, exporter, folder, models, console)
    times = time_all(exporter, done)
    rows = table_rows(done, failed, times[0] if times else None)
    print_rows(rows, console)
    picture = draw_example(exporter, folder, models)
    threads = torch.get_num_threads()
    notes = [
        f'`error`: against torch, relative, the worst of {len(exporter.pictures)} pictures, noise and a batch. '
        f'`ms`: one image, {threads} thread(s), medians of runs in alternation on the machine that exported'
        + (f'; torch as loaded: {times[0]:.1f} ms.' if times else '.'),
        *notes,
    ]
    write_metadata(folder, meta, models)
    write_readme(folder, meta, models, notes, picture)
    if options.report:
        (folder / 'report.md').write_text(markdown_rows(rows), encoding='utf-8')
        (folder / 'report.json').write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')


def measure_accuracy(
    cfg: Config, exporter: Exporter, folder: Path, models: dict[str, Any], console: Console
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


def is_checked(entry: dict[str, Any]) -> bool:
    """Whether a model cannot be run here, and was checked in another way."""
    return re.fullmatch(r'[-+.\de]+', entry['error']) is None


def draw_example(exporter: Exporter, folder: Path, models: dict[str, Any]) -> str | None:
    """Draw what predict.py finds in a picture; the name of the file."""
    entry = next((e for e in models.values() if not is_checked(e)), None)
    if entry is None or entry['answers'] not in ('detections', 'boxes', 'probabilities', 'map'):
        return None
    name = next(key for key, value in models.items() if value is entry)
    model = predict.Model(folder, name, torch.get_num_threads())
    picture = exporter.pictures[0]
    predict.draw(picture, model(picture), exporter.meta['palette']).save(folder / 'example.png')
    return 'example.png'
