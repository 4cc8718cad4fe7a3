"""Int8 ONNX graphs: calibrated on images, and their accuracy."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner

from .onnx_network import import_onnx

IMAGES = 256  # at most, for calibration
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def find_images(folder: Path) -> list[Path]:
    """Choose images spread evenly over all in a folder and the folders in it.

    Raises:
        ValueError: If there are none.
    """
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f'--quantize is {folder}: no images there ({" ".join(SUFFIXES)})')
    return paths[:: -(-len(paths) // IMAGES)]


def prepared(paths: Iterable[Path], inferencer: Any, shape: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """What the network is given of images, (1, 3, H, W), by the config's pipeline and normalisation.

    Raises:
        ValueError: If that is not of the shape asked for.
    """
    for path in paths:
        data = next(iter(inferencer.preprocess([str(path)], 1)))
        data = data[1] if isinstance(data, (list, tuple)) else data  # MMDetection adds the image
        x = inferencer.model.data_preprocessor(data, False)['inputs'].numpy()
        if shape and x.shape[2:] != shape:
            given = 'the graph takes {} x {} (--shape)'.format(*shape)
            raise ValueError(
                '{}: the pipeline of the config makes it {} x {} pixels (height x width), but {}; '
                'export with --dynamic'.format(path, *x.shape[2:], given)
            )
        yield x


def quantize(graph: Any, images: Iterator[np.ndarray]) -> Any:
    """Make an int8 graph, with the ranges of activations that images (1, 3, H, W) cause.

    Weights have a scale for each output channel. The attention of windows stays in fp32, which is as fast and
    nearer to the graph that was given.
    """
    onnx, tools = import_onnx('onnx'), import_onnx('onnxruntime.quantization')

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(images, None)
            return None if x is None else {'image': x}

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises what is done here
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ('fp32.onnx', 'folded.onnx', 'int8.onnx')]
            onnx.save(graph, files[0])
            tools.shape_inference.quant_pre_process(*files[:2], skip_symbolic_shape=True)
            folded = onnx.load(files[1]).graph
            weights = {weight.name for weight in folded.initializer}
            attention = [
                node.name
                for node in folded.node
                if node.op_type == 'Softmax' or (node.op_type == 'MatMul' and not weights & set(node.input))
            ]
            tools.quantize_static(
                *files[1:],
                Reader(),
                activation_type=tools.QuantType.QUInt8,  # with QInt8 onnxruntime falls back to fp32 on x86
                per_channel=True,
                nodes_to_exclude=attention,
            )
            result = onnx.load(files[2])
    finally:
        logging.disable(level)
    del result.metadata_props[:]
    result.metadata_props.extend(graph.metadata_props)
    return result


def difference(ours: Any, theirs: Any, images: Iterable[np.ndarray]) -> float:
    """How far the outputs of one session are from those of another, relative, in the mean over images."""
    found = []
    for x in images:
        a, b = (np.concatenate([y.ravel() for y in s.run(None, {'image': x})]) for s in (ours, theirs))
        found.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    return float(np.mean(found))


def accuracies(cfg: Config, model: Any, sessions: Iterable[Any]) -> tuple[int, list[float]] | None:
    """Top-1 in percent of classifiers on the validation images of their config, and how many these are.

    None if the config has no such images, or they are not there.
    """
    if not cfg.get('val_dataloader'):
        return None
    own = dict(num_workers=0, persistent_workers=False, collate_fn=dict(type='default_collate'))
    try:
        batches = Runner.build_dataloader({**cfg.val_dataloader, **own})
    except FileNotFoundError:
        return None
    labels: list[int] = []
    guesses: list[list[int]] = [[] for _ in sessions]
    for batch in batches:
        data = model.data_preprocessor(batch, False)
        labels += [int(sample.gt_label) for sample in data['data_samples']]
        for found, session in zip(guesses, sessions):
            found += session.run(None, {'image': data['inputs'].numpy()})[0].argmax(1).tolist()
    return len(labels), [100 * float(np.mean(np.equal(found, labels))) for found in guesses]
