"""Run an exported model on images, without torch or OpenMMLab.

    python predict.py IMAGE_OR_FOLDER --out OUT [--score-thr 0.3] [--model NAME]

    from predict import Model

    model = Model('FOLDER_OF_THIS_FILE')
    found = model('photo.jpg')

It needs Python 3.8 or newer, NumPy, Pillow and the runtime of the model (README.md names it). All that it
knows about the model is in model.json next to it: how images are prepared, what comes out, class names.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

SCHEMA = 1  # of model.json
TOP = 5  # classes of a classifier that are listed
DECODED = ('detections', 'boxes', 'probabilities', 'map', 'logits')  # answers of which results are made
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
Image.MAX_IMAGE_PIXELS = None  # large photographs are not attacks here


# ---------------------------------------------------------------------------------------------- runtimes
#
# Each is made from the bundle's folder, the model's entry in model.json and a number of threads (None: the
# runtime's default). It maps the input array to the arrays of the outputs that are asked for by name.


class OnnxRuntime:
    """ONNX Runtime on the CPU: ``pip install onnxruntime``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        onnxruntime = import_module('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # Threads that spin while they wait slow down everything else on a busy machine.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        path = str(folder / entry['files'][0])
        self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        self.input = entry['input']['name']

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        return self.session.run(list(names), {self.input: image})


class OpenVINO:
    """OpenVINO on the CPU: ``pip install openvino``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        settings: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        path = str(folder / entry['files'][0])
        self.model = import_module('openvino').Core().compile_model(path, 'CPU', settings)

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        found = self.model(image)
        return [np.array(found[name]) for name in names]


class TorchScript:
    """TorchScript on the CPU: ``pip install torch``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        self.torch = import_module('torch')
        if threads:
            self.torch.set_num_threads(threads)
        self.module = self.torch.jit.load(str(folder / entry['files'][0]), map_location='cpu')
        self.names = [output['name'] for output in entry['outputs']]

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        with self.torch.inference_mode():
            found = dict(zip(self.names, self.module(self.torch.from_numpy(image))))
        return [found[name].numpy() for name in names]


class Ncnn:
    """ncnn on the CPU: ``pip install ncnn``. One image at a time."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        self.ncnn, self.outputs = import_module('ncnn'), entry['outputs']
        self.net = self.ncnn.Net()
        options = self.net.opt
        if threads:
            options.num_threads = threads
        if platform.machine().lower() in ('x86_64', 'amd64'):
            options.use_packing_layout = entry['x86_packing']  # most models are faster without
        if entry['precision'] == 'fp32':  # ncnn's default is half precision where the processor has it
            options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        paths = [str(folder / file) for file in entry['files']]
        if self.net.load_param(paths[0]) or self.net.load_model(paths[1]):
            raise RuntimeError(f'{paths[0]}: ncnn cannot load it')

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        if image.dtype == np.uint8:
            height, width = image.shape[1:3]
            order = self.ncnn.Mat.PixelType.PIXEL_BGR  # of the image and of the model: nothing is swapped
            given = self.ncnn.Mat.from_pixels(np.ascontiguousarray(image[0]), order, width, height)
        else:
            given = self.ncnn.Mat(image[0]).clone()
        extractor = self.net.create_extractor()
        extractor.input('in0', given)
        found = {}
        for i, output in enumerate(self.outputs):
            if output['name'] in names:
                failed, value = extractor.extract(f'out{i}')
                if failed:
                    raise RuntimeError(f'ncnn cannot compute {output["name"]}')
                found[output['name']] = np.array(value).reshape(output['shape'])
        return [found[name] for name in names]


class MNN:
    """MNN on the CPU: ``pip install MNN``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        mnn, self.expr = import_module('MNN'), import_module('MNN.expr')
        settings = {'backend': 'CPU', 'precision': 'high', 'numThread': threads or 4}
        self.outputs = entry['outputs']
        self.module = mnn.nn.load_module_from_file(
            str(folder / entry['files'][0]),
            [entry['input']['name']],
            [output['name'] for output in self.outputs],
            runtime_manager=mnn.nn.create_runtime_manager((settings,)),
        )

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        expr = self.expr
        given = expr.placeholder(
            list(image.shape), expr.NCHW, expr.uint8 if image.dtype == np.uint8 else expr.float
        )
        given.write(image)
        values = self.module.forward([given])
        if len(values) != len(self.outputs):
            raise RuntimeError('MNN cannot compute the model')
        found = {}
        for output, value in zip(self.outputs, values):
            if len(value.shape) == 4:
                value = expr.convert(value, expr.NCHW)
            found[output['name']] = np.array(value.read()).astype(output['dtype'], copy=False)
        return [found[name] for name in names]


class CoreML:
    """Core ML on macOS: ``pip install coremltools``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        if platform.system() != 'Darwin':
            raise OSError('Core ML runs on macOS and iOS alone; choose another model with --model')
        self.model = import_module('coremltools').models.MLModel(str(folder / entry['files'][0]))
        self.input, self.outputs = entry['input'], entry['outputs']
        self.bgr = entry.get('color_layout') == 'BGR'

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        given: Any = image
        if image.dtype == np.uint8:  # Core ML takes pictures, and orders the colors itself
            given = Image.fromarray(np.ascontiguousarray(image[0][..., ::-1] if self.bgr else image[0]))
        found = self.model.predict({self.input['name']: given})
        types = {output['name']: output['dtype'] for output in self.outputs}
        return [np.asarray(found[name]).astype(types[name], copy=False) for name in names]


class LiteRT:
    """LiteRT, earlier called TensorFlow Lite, on the CPU: ``pip install ai-edge-litert``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        path = str(folder / entry['files'][0])
        interpreter = import_module('ai_edge_litert.interpreter').Interpreter(path, num_threads=threads)
        self.runner = interpreter.get_signature_runner()
        self.input = entry['input']['name']

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        found = self.runner(**{self.input: image})
        return [found[name] for name in names]


class ExecuTorch:
    """ExecuTorch on the CPU: ``pip install executorch torch``."""

    def __init__(self, folder: Path, entry: dict[str, Any], threads: int | None) -> None:
        self.torch = import_module('torch')
        if threads:
            import_module('executorch.extension.pybindings.portable_lib')._unsafe_reset_threadpool(threads)
        runtime = import_module('executorch.runtime').Runtime.get()
        self.method = runtime.load_program(str(folder / entry['files'][0])).load_method('forward')
        self.names = [output['name'] for output in entry['outputs']]

    def __call__(self, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        found = dict(zip(self.names, self.method.execute([self.torch.from_numpy(image)])))
        return [found[name].numpy() for name in names]


RUNTIMES: dict[str, Callable[[Path, dict[str, Any], int | None], Any]] = {
    'onnx': OnnxRuntime,
    'openvino': OpenVINO,
    'torchscript': TorchScript,
    'ncnn': Ncnn,
    'mnn': MNN,
    'coreml': CoreML,
    'web': OnnxRuntime,  # the page of index.html has the same file
    'litert': LiteRT,
    'executorch': ExecuTorch,
}


# ---------------------------------------------------------------------------------------------- images


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 in RGB, turned upright as its EXIF data say.

    Grey images get three equal channels, an alpha channel is dropped, of 16 bits the upper 8 are kept.

    Raises:
        ValueError: If the file is damaged or not an image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I'):  # 16 bits
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.stack([grey] * 3, axis=-1)
            return np.array(image.convert('RGB'))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f'{path}: cannot be read as an image ({" ".join(str(error).split())})') from None


def resize_bilinear(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 as OpenCV's INTER_LINEAR does, in its fixed-point arithmetic."""

    def places(old: int, new: int, clamp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        x = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        first = np.floor(x).astype(np.int64)
        share = x - first.astype(np.float32)
        if clamp:
            share[(first < 0) | (first >= old - 1)] = 0
        weights = [np.rint(w * np.float32(2048)).astype(np.int32) for w in (1 - share, share)]
        return first.clip(0, old - 1), (first + 1).clip(0, old - 1), weights[0], weights[1]

    left, right, a, b = places(image.shape[1], width, True)
    top, bottom, c, d = places(image.shape[0], height, False)  # OpenCV rounds twice in the outermost rows
    rows = image.astype(np.int32)
    rows = (rows[:, left] * a[:, None] + rows[:, right] * b[:, None]) >> 4
    found = ((rows[top] * c[:, None, None]) >> 16) + ((rows[bottom] * d[:, None, None]) >> 16)
    return ((found + 2) >> 2).astype(np.uint8)


def resize_nearest(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize as OpenCV's INTER_NEAREST does."""
    y, x = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(int), old - 1)
        for new, old in zip((height, width), image.shape)
    )
    return image[y[:, None], x]


def resize_image(image: np.ndarray, width: int, height: int, step: dict[str, Any]) -> np.ndarray:
    """Resize by the rule of a step: ``backend`` cv2 or pillow, ``interpolation``."""
    if image.shape[:2] == (height, width):
        return image
    if step.get('backend', 'cv2') == 'pillow':
        codes = dict(nearest=0, lanczos=1, bilinear=2, bicubic=3, box=4, hamming=5)  # Pillow's numbers
        code = Image.Resampling(codes[step['interpolation']])
        return np.array(Image.fromarray(image).resize((width, height), code))
    return dict(bilinear=resize_bilinear, nearest=resize_nearest)[step['interpolation']](image, width, height)


def pad_image(image: np.ndarray, height: int, width: int, value: Any) -> np.ndarray:
    """Pad at right and bottom to at least height x width with a value, or one a channel."""
    height, width = max(height, image.shape[0]), max(width, image.shape[1])
    if image.shape[:2] == (height, width):
        return image
    padded = np.empty((height, width, 3), image.dtype)
    padded[:] = np.asarray(value, image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def apply_step(image: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    """Apply one step of model.json's ``preprocess`` to (H, W, 3) uint8.

    ``resize``: to ``scale`` (width, height), with ``keep_ratio`` the largest that fits the long side of
    ``scale`` and its short side; ``factor`` instead of ``scale`` multiplies. ``fit`` (width, height) is a
    size that the image must not exceed. ``resize_edge``: the edge ``short``, ``long``, ``width`` or
    ``height`` becomes ``scale``. ``center_crop``: to ``size`` (width, height). ``pad``: at right and bottom
    to ``size`` (width, height), to a multiple of ``divisor`` or to a square.
    """
    height, width = image.shape[:2]
    if step['op'] == 'resize':
        if 'scale' in step and not step['keep_ratio']:
            return resize_image(image, step['scale'][0], step['scale'][1], step)
        factor = step.get('factor')
        if factor is None:
            factor = min(
                max(step['scale']) / max(height, width),
                min(step['scale']) / min(height, width),
            )
        if 'fit' in step:
            factor = min(factor, step['fit'][0] / width, step['fit'][1] / height)
        new = (max(1, int(width * float(factor) + 0.5)), max(1, int(height * float(factor) + 0.5)))
        return resize_image(image, new[0], new[1], step)
    if step['op'] == 'resize_edge':
        edge, scale = step['edge'], step['scale']
        by_width = (edge == 'short' and width < height) or (edge == 'long' and width > height)
        if by_width or edge == 'width':
            return resize_image(image, scale, int(scale * height / width), step)
        return resize_image(image, int(scale * width / height), scale, step)
    if step['op'] == 'center_crop':
        new_width, new_height = (min(new, old) for new, old in zip(step['size'], (width, height)))
        y = max(0, int(round((height - new_height) / 2.0)))
        x = max(0, int(round((width - new_width) / 2.0)))
        return image[y : y + new_height, x : x + new_width]
    if step['op'] == 'pad':
        if step.get('square'):
            height = width = max(height, width)
        if step.get('size'):
            width, height = step['size']
        if step.get('divisor'):
            height, width = (math.ceil(n / step['divisor']) * step['divisor'] for n in (height, width))
        return pad_image(image, height, width, step['value'])
    raise ValueError(f'model.json: unknown step {step["op"]!r} in "preprocess"')


class Prepared(NamedTuple):
    """An image as the model takes it, and what maps results back to the image as it was.

    Attributes:
        array: Input of the model, a batch of one.
        size: Height and width of the image as it was.
        valid: Height and width of the part of ``array`` that is image; the rest is padding.
        scale: Factors by which width and height were multiplied.
    """

    array: np.ndarray
    size: tuple[int, ...]
    valid: tuple[int, ...]
    scale: tuple[float, float]


def prepare(image: np.ndarray, meta: dict[str, Any], entry: dict[str, Any]) -> Prepared:
    """Prepare an image (H, W, 3) uint8 in RGB for a model.

    Args:
        image: The image.
        meta: Content of model.json.
        entry: The model's entry in ``meta['models']``.
    """
    size = image.shape[:2]
    scale = (1.0, 1.0)
    for step in meta['preprocess']:
        old = image.shape[:2]
        image = apply_step(image, step)
        if step['op'].startswith('resize'):
            scale = (scale[0] * image.shape[1] / old[1], scale[1] * image.shape[0] / old[0])
    valid = image.shape[:2]
    if meta['color_order'] == 'BGR':
        image = image[..., ::-1]
    mean, std = (np.asarray(meta[key], np.float32) for key in ('mean', 'std'))
    as_float = entry['input']['dtype'] == 'float32'
    array = (image.astype(np.float32) - mean) / std if as_float else image
    padding = 0 if as_float else np.rint(mean)  # the mean color is zero once normalized
    if meta['input_size']:
        array = pad_image(array, meta['input_size'][0], meta['input_size'][1], padding)
        if list(array.shape[:2]) != meta['input_size']:
            raise ValueError(f'the prepared image is {array.shape[:2]}, not {meta["input_size"]} (H, W)')
    elif as_float and meta['size_divisor'] > 1:  # a model of any size that takes uint8 pads by itself
        height, width = (math.ceil(n / meta['size_divisor']) * meta['size_divisor'] for n in valid)
        array = pad_image(array, height, width, padding)
    if entry['input']['layout'] == 'NCHW':
        array = array.transpose(2, 0, 1)
    return Prepared(np.ascontiguousarray(array[None]), size, valid, scale)


# ---------------------------------------------------------------------------------------------- answers


def suppress(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_thr: float, most: int
) -> list[int]:
    """Non-maximum suppression within each class; indices of what is kept, best first.

    Args:
        boxes: (P, 4), x1, y1, x2, y2.
        scores: (P,).
        labels: (P,).
        iou_thr: A box that overlaps a better one by more is dropped.
        most: Number of boxes to keep.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-scores, kind='stable')
    kept: list[int] = []
    while len(order) and len(kept) < most:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        common = (high - low).clip(0).prod(axis=1)
        iou = common / np.maximum(areas[best] + areas[order] - common, 1e-9)
        order = order[(iou <= iou_thr) | (labels[order] != labels[best])]
    return kept


def choose_boxes(
    boxes: np.ndarray, scores: np.ndarray, nms: dict[str, Any], levels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Do what a model with NMS does inside: from all boxes to (K, 5) with scores, and (K,) labels.

    Args:
        boxes: (P, 4), one an anchor.
        scores: (P, classes).
        nms: ``score_thr``, ``iou_thr``, ``pre`` (candidates of one level) and ``max`` (boxes kept).
        levels: Anchors of each level of the feature pyramid; their sum is P.
    """
    classes = scores.shape[1]
    chosen, start = [], 0
    for count in levels:
        level = scores[start : start + count].ravel()
        index = np.flatnonzero(level > nms['score_thr'])
        index = index[np.argsort(-level[index], kind='stable')][: nms['pre']]
        chosen.append(index + start * classes)
        start += count
    index = np.concatenate(chosen)
    candidates, labels = boxes[index // classes], index % classes
    found = scores.ravel()[index]
    sides = candidates[:, 2:] - candidates[:, :2]
    whole = (sides > 0).all(axis=1)
    candidates, labels, found = candidates[whole], labels[whole], found[whole]
    kept = suppress(candidates, found, labels, nms['iou_thr'], nms['max'])
    return np.concatenate([candidates[kept], found[kept, None]], axis=1), labels[kept]


def paste_mask(mask: np.ndarray, box: np.ndarray, size: Sequence[int], threshold: float) -> np.ndarray:
    """Enlarge the mask (m, m) of a box (x1, y1, x2, y2, and whatever follows) to the image: (H, W) bool.

    Pixels are sampled bilinearly, as torch's grid_sample does without aligned corners.
    """
    found, box = np.zeros(size, bool), box[:4]
    x1, y1 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
    x2, y2 = np.minimum(np.ceil(box[2:]).astype(int) + 1, size[::-1])
    if x2 <= x1 or y2 <= y1 or box[2] <= box[0] or box[3] <= box[1]:
        return found

    def weights(first: int, last: int, low: float, high: float, count: int) -> np.ndarray:
        place = (np.arange(first, last, dtype=np.float32) + 0.5 - low) / (high - low) * count - 0.5
        return np.maximum(0, 1 - abs(place[:, None] - np.arange(count, dtype=np.float32)))

    rows = weights(y1, y2, box[1], box[3], mask.shape[0])
    columns = weights(x1, x2, box[0], box[2], mask.shape[1])
    found[y1:y2, x1:x2] = rows @ mask @ columns.T >= threshold
    return found


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length encoding of (H, W) bool."""
    flat = mask.ravel(order='F')
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]]).astype(np.int8)))
    runs = np.diff(np.concatenate([[0], ends, [] if len(ends) and ends[-1] == flat.size else [flat.size]]))
    counts = runs.astype(int).tolist()
    text = ''
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = x & 0x1F
            x >>= 5
            more = x != (-1 if bits & 0x10 else 0)
            text += chr((bits | 0x20 if more else bits) + 48)
    return dict(size=list(mask.shape), counts=text)


def resize_matrix(old: int, new: int, align_corners: bool) -> np.ndarray:
    """The matrix (new, old) of torch's bilinear interpolation along one axis."""
    if align_corners:
        places = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        places = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0)
    first = np.floor(places).astype(int).clip(0, old - 1)
    matrix = np.zeros((new, old), np.float32)
    share = (places - first).astype(np.float32)
    matrix[np.arange(new), first] = 1 - share
    matrix[np.arange(new), np.minimum(first + 1, old - 1)] += share
    return matrix


def enlarge_logits(
    logits: np.ndarray, prepared: Prepared, align_corners: bool, model_size: Sequence[int]
) -> np.ndarray:
    """Logits (C, h, w) of a segmentor to the size of the image, as MMSegmentation does: (C, H, W).

    They are resized to the model's input, the padding is cut off, and the rest is resized to the image.
    """
    matrices = []
    for i in range(2):
        inside = resize_matrix(logits.shape[1 + i], model_size[i], align_corners)[: prepared.valid[i]]
        matrices.append(resize_matrix(prepared.valid[i], prepared.size[i], align_corners) @ inside)
    return matrices[0] @ logits @ matrices[1].T


# ---------------------------------------------------------------------------------------------- the model


class Model:
    """An exported model.

    Args:
        folder: The bundle: model.json and the files that it names.
        name: Which of the bundle's models to run, a key of ``models`` in model.json. Defaults to the first.
        threads: For the runtime. Defaults to its own choice.

    Raises:
        FileNotFoundError: If model.json or a file of the model is missing.
        ValueError: If there is no such model, or it is of a newer kind.
        ImportError: If the runtime is not installed; the message says how to install it.
    """

    def __init__(self, folder: str | Path, name: str | None = None, threads: int | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / 'model.json'
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file; give the folder that the export has written')
        try:
            self.meta = json.loads(path.read_text(encoding='utf-8'))
            version, models = self.meta['schema'], self.meta['models']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}: it does not describe a model ({error})') from None
        if version != SCHEMA:
            raise ValueError(f'{path}: schema {version}, but this predict.py reads {SCHEMA}; export again')
        self.name = name or next(iter(models))
        if self.name not in models:
            raise ValueError(f'{path}: no model {self.name!r}; there are {", ".join(models)}')
        self.entry = models[self.name]
        missing = [file for file in self.entry['files'] if not (self.folder / file).exists()]
        if missing:
            raise FileNotFoundError(f'{self.folder}: {", ".join(missing)} is missing; copy the whole folder')
        try:
            self.runtime = RUNTIMES[self.entry['runtime']](self.folder, self.entry, threads)
        except ImportError as error:
            raise ImportError(f'{error}; run `pip install {self.entry["install"]}`') from None
        self.outputs = [output['name'] for output in self.entry['outputs']]

    def run(self, array: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Outputs by name (all, or those of ``names``) for an input array such as ``prepare()`` makes."""
        names = self.outputs if names is None else names
        batch, count = self.entry['input']['shape'][0], len(array)
        if isinstance(batch, int) and count < batch:  # a model that takes just so many
            array = np.concatenate([array, np.repeat(array[-1:], batch - count, axis=0)])
        return {name: y[:count] for name, y in zip(names, self.runtime(array, names))}

    def prepare(self, image: str | Path | np.ndarray) -> Prepared:
        """Prepare an image: a file, or (H, W, 3) uint8 in RGB."""
        return prepare(self._pixels(image), self.meta, self.entry)

    def __call__(self, image: str | Path | np.ndarray, score_thr: float | None = None) -> dict[str, Any]:
        """What the model finds in an image.

        Args:
            image: A file, or pixels (H, W, 3) uint8 in RGB.
            score_thr: Detectors: leave out lower scores. Defaults to that of model.json.

        Returns:
            A dict with ``width``, ``height`` and

            - of a detector ``objects``: dicts with ``class``, ``label``, ``score``, ``box`` (x1, y1, x2, y2
              in pixels of the image) and, if it has masks, ``mask`` (COCO's run-length encoding);
            - of a classifier ``classes``: the best five, dicts with ``class``, ``label`` and ``score``;
            - of a segmentor ``map``, (H, W) class numbers, and ``segments``: dicts with ``class``, ``label``
              and ``share``.

        Raises:
            ValueError: If the image cannot be read, or the model gives maps that this file does not decode.
        """
        answers = self.entry['answers']
        if answers not in DECODED:
            raise ValueError(
                f'this model gives {answers}, which are not decoded here; call run(prepare(...))'
            )
        pixels = self._pixels(image)
        prepared = prepare(pixels, self.meta, self.entry)
        height, width = prepared.size
        found: dict[str, Any] = dict(width=width, height=height)
        if answers == 'probabilities':
            found['classes'] = self._classes(self.run(prepared.array)['probabilities'][0])
        elif answers in ('map', 'logits'):
            found['map'] = self.map(prepared)
            found['segments'] = self._segments(found['map'])
        else:
            thr = self.meta['score_thr'] if score_thr is None else score_thr
            found['objects'] = self._objects(prepared, thr)
        return found

    @staticmethod
    def _pixels(image: str | Path | np.ndarray) -> np.ndarray:
        if not isinstance(image, np.ndarray):
            return read_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f'the image is {image.shape} {image.dtype}; give (H, W, 3) uint8 in RGB')
        return image

    def _name(self, label: int) -> str:
        names = self.meta['classes']
        return names[label] if names and label < len(names) else str(label)

    def detections(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Boxes (K, 5) in pixels of the image with scores, labels (K,), and masks (K, m, m) or None."""
        found = self.run(prepared.array)
        if self.entry['answers'] == 'boxes':
            dets, labels = choose_boxes(
                found['boxes'][0], found['scores'][0], self.meta['nms'], self.entry['levels']
            )
            masks = None
        else:
            dets, labels = found['dets'][0], found['labels'][0]
            masks = found['masks'][0] if 'masks' in found else None
        dets = dets.astype(np.float32)
        dets[:, :4] /= np.array(prepared.scale * 2, np.float32)
        limits = np.array(prepared.size[::-1] * 2, np.float32)
        dets[:, :4] = dets[:, :4].clip(0, limits)
        real = (labels >= 0) & (dets[:, 2] > dets[:, 0]) & (dets[:, 3] > dets[:, 1])
        return dets[real], labels[real], None if masks is None else masks[real]

    def _objects(self, prepared: Prepared, score_thr: float) -> list[dict[str, Any]]:
        dets, labels, masks = self.detections(prepared)
        objects = []
        for i in np.argsort(-dets[:, 4], kind='stable'):
            if dets[i, 4] < score_thr:
                break
            label = int(labels[i])
            box = [round(float(x), 2) for x in dets[i, :4]]
            score = round(float(dets[i, 4]), 4)
            objects.append({'class': self._name(label), 'label': label, 'score': score, 'box': box})
            if masks is not None:
                threshold = self.meta['mask_thr']
                objects[-1]['mask'] = encode_mask(paste_mask(masks[i], dets[i], prepared.size, threshold))
        return objects

    def _classes(self, scores: np.ndarray) -> list[dict[str, Any]]:
        best = np.argsort(-scores, kind='stable')[:TOP].tolist()
        return [{'class': self._name(i), 'label': i, 'score': round(float(scores[i]), 4)} for i in best]

    def logits(self, prepared: Prepared) -> np.ndarray:
        """Logits of a segmentor at the size of the image: (classes, H, W)."""
        logits = self.run(prepared.array, ['logits'])['logits'][0].astype(np.float32)
        at = 1 if self.entry['input']['layout'] == 'NHWC' else 2
        model_size = prepared.array.shape[at : at + 2]
        return enlarge_logits(logits, prepared, self.meta['align_corners'], model_size)

    def map(self, prepared: Prepared) -> np.ndarray:
        """Class numbers of a segmentor at the size of the image: (H, W)."""
        logits = self.logits(prepared)
        if len(logits) == 1:  # of a binary segmentor
            t = self.meta['binary_thr']
            return (logits[0] > math.log(t / (1 - t))).astype(np.uint8)
        return logits.argmax(axis=0).astype(np.uint8 if len(logits) <= 256 else np.uint16)

    def _segments(self, classes: np.ndarray) -> list[dict[str, Any]]:
        labels, counts = np.unique(classes, return_counts=True)
        return [
            {
                'class': self._name(int(labels[i])),
                'label': int(labels[i]),
                'share': round(float(counts[i] / counts.sum()), 4),
            }
            for i in np.argsort(-counts, kind='stable')
        ]


# ---------------------------------------------------------------------------------------------- files


def decode_mask(mask: dict[str, Any]) -> np.ndarray:
    """The reverse of :func:`encode_mask`."""
    counts: list[int] = []
    x = shift = 0
    for char in mask['counts']:
        bits = ord(char) - 48
        x |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                x |= -1 << shift
            counts.append(x + counts[-2] if len(counts) > 2 else x)
            x = shift = 0
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(mask['size'], order='F')


def draw(image: np.ndarray, found: dict[str, Any], palette: Sequence[Sequence[int]]) -> Image.Image:
    """A picture of what was found in an image (H, W, 3) uint8 in RGB."""

    def color(label: int) -> tuple[int, ...]:
        return tuple(palette[label % len(palette)]) if palette else (255, 64, 64)

    pixels = image.astype(np.float32)
    if 'map' in found:
        table = np.array([color(i) for i in range(int(found['map'].max()) + 1)], np.float32)
        pixels = 0.4 * pixels + 0.6 * table[found['map']]
    for item in reversed(found.get('objects', [])):
        if 'mask' in item:
            inside = decode_mask(item['mask'])
            pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(color(item['label']), np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, background: tuple[int, ...]) -> None:
        text = text.encode('latin-1', 'replace').decode('latin-1')  # the built-in font knows no more
        left, top, right, bottom = pen.textbbox((x, y), text)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=background)
        pen.text((x, y), text, fill=(0, 0, 0) if sum(background) > 382 else (255, 255, 255))

    for item in reversed(found.get('objects', [])):  # the best on top
        pen.rectangle(item['box'], outline=color(item['label']), width=max(1, min(image.shape[:2]) // 200))
        place = item['box'][0], max(0, item['box'][1] - 11)
        write(place[0], place[1], f'{item["class"]} {item["score"]:.2f}', color(item['label']))
    for i, item in enumerate(found.get('classes', [])):
        write(2, 2 + 12 * i, f'{item["class"]} {item["score"]:.2f}', (0, 0, 0))
    for i, item in enumerate(found.get('segments', [])[:TOP]):
        write(2, 2 + 12 * i, f'{item["class"]} {item["share"]:.0%}', color(item['label']))
    return picture


def to_json(value: Any) -> str:
    """JSON with a line for each object found."""
    if isinstance(value, list):
        return f'[{",".join(chr(10) + "    " + to_json(x) for x in value)}]'
    return json.dumps(value, ensure_ascii=False)


def describe(found: dict[str, Any]) -> str:
    """What was found, in one line."""
    if 'classes' in found:
        return f'{found["classes"][0]["class"]} ({found["classes"][0]["score"]:.2f})'
    if 'segments' in found:
        return ', '.join(f'{item["share"]:.0%} {item["class"]}' for item in found['segments'][:TOP])
    counts: dict[str, int] = {}
    for item in found['objects']:
        counts[item['class']] = counts.get(item['class'], 0) + 1
    parts = sorted(counts.items(), key=lambda pair: -pair[1])
    return ', '.join(f'{count} x {name}' for name, count in parts) or 'nothing'


def save(out: Path, path: Path, image: np.ndarray, found: dict[str, Any], palette: Sequence[Any]) -> None:
    """Write ``vis/NAME`` (a picture) and ``preds/NAME.json``, and of a segmentor ``preds/NAME.png``."""
    for name in ('vis', 'preds'):
        (out / name).mkdir(parents=True, exist_ok=True)
    picture = path.name if path.suffix.lower() in ('.jpg', '.jpeg', '.png') else f'{path.name}.jpg'
    draw(image, found, palette).save(out / 'vis' / picture)
    entries = dict(image=str(path), width=found['width'], height=found['height'])
    entries.update(found)
    if 'map' in found:
        Image.fromarray(found['map']).save(out / 'preds' / f'{path.name}.png')
        entries['map'] = f'preds/{path.name}.png'
    lines = [f'  {json.dumps(key)}: {to_json(value)}' for key, value in entries.items()]
    text = '{\n' + ',\n'.join(lines) + '\n}\n'
    (out / 'preds' / f'{path.name}.json').write_text(text, encoding='utf-8')


def find_images(path: Path) -> list[Path]:
    """The image itself, or the images in a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such image or folder')
    found = sorted(
        file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith('.')
    )
    if not found:
        raise ValueError(f'{path}: no images there ({" ".join(SUFFIXES)})')
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if files were skipped because they cannot be read; 2 if nothing could be done."""
    parser = argparse.ArgumentParser(description='Run the exported model next to this file on images.')
    parser.add_argument('images', type=Path, metavar='IMAGE_OR_FOLDER')
    parser.add_argument(
        '--out', type=Path, required=True, help='folder for pictures (vis/) and JSON (preds/)'
    )
    parser.add_argument('--score-thr', type=float, help='detectors: leave out lower scores')
    parser.add_argument(
        '--model', metavar='NAME', help='a key of "models" in model.json (default: the first)'
    )
    parser.add_argument(
        '--bundle', type=Path, default=Path(__file__).resolve().parent, help=argparse.SUPPRESS
    )
    parser.add_argument('--threads', type=int, help="for the runtime (default: the runtime's choice)")
    args = parser.parse_args(arguments)
    try:
        paths = find_images(args.images)
        if args.images.resolve() in ((args.out / name).resolve() for name in ('vis', 'preds')):
            raise ValueError(f'--out is {args.out}: pictures would overwrite the images; give another folder')
        model = Model(args.bundle, args.model, args.threads)
    except (OSError, ValueError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    skipped = []
    for number, path in enumerate(paths, 1):
        mark = f'[{number}/{len(paths)}] {path.name}:'
        try:
            image = read_image(path)
        except ValueError as error:
            skipped.append(path.name)
            print(mark, f'skipped, {error}', flush=True)
            continue
        try:
            found = model(image, args.score_thr)
        except ValueError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2
        print(mark, describe(found), flush=True)
        save(args.out, path, image, found, model.meta['palette'])
    print(f'{len(paths) - len(skipped)} pictures in {args.out}/vis, as JSON in {args.out}/preds')
    if skipped:
        print(f'{len(skipped)} of {len(paths)} files were skipped: {", ".join(skipped)}', file=sys.stderr)
    return 1 if skipped else 0


if __name__ == '__main__':
    sys.exit(main())
