"""Inference with any model of the three libraries: predictions as plain data, and pictures.

Needs MMCV, Pillow, OpenCV and the library of the config (extras ``cls``, ``det``, ``seg``).
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image, UnidentifiedImageError

from .config import innermost_dataset
from .datasets.files import is_hidden
from .errors import printable
from .fonts import use_font_for
from .weights.read import read_checkpoint

Prediction = Tuple[Dict[str, Any], str, np.ndarray]  # for the file, in words, drawn (H, W, 3) in RGB

TOP = 5  # classes of a classifier that are written
Image.MAX_IMAGE_PIXELS = None  # OpenCV has a limit of its own


def read_image(path: Path) -> np.ndarray:
    """Read an image (H, W, 3) in BGR as the code bases do, but insist that it is whole.

    Raises:
        ValueError: If it is damaged or of an unknown kind.
    """
    kind = 'not an image'
    try:
        with Image.open(path) as image:  # OpenCV fills up what is missing
            kind = f'{image.format} cannot be read by OpenCV'
            image.load()
    except UnidentifiedImageError:  # but OpenCV may know it
        pass
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'cannot be read: {error}') from None
    try:
        pixels = mmcv.imread(str(path))
    except cv2.error:  # an empty file
        pixels = None
    if pixels is None:
        raise ValueError(kind)
    return pixels


def list_files(path: Path, out: Path) -> list[Path]:
    """Find the files to look at."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such image or folder')
    if path.resolve() in ((out / name).resolve() for name in ('vis', 'preds')):
        raise ValueError(f'--out is {out}: pictures would be written over the images; give another folder')
    files = sorted(file for file in path.iterdir() if file.is_file() and not is_hidden(file.name))
    if not files:
        raise ValueError(f'{path}: the folder holds no files')
    return files


def find_names(known: Any, cfg: Config) -> dict[str, Any]:
    """Find names and colours of the classes in what a checkpoint knows of its data, else in the config."""
    model = cfg.model
    head = model.get('roi_head', model).get('bbox_head') or model.get('decode_head') or model.head
    count = head.num_classes
    dataset = innermost_dataset(cfg.test_dataloader.dataset)
    registry = import_module(f'{cfg.default_scope}.registry')
    kind = registry.DATASETS.get(dataset.type)
    sources = (known, dataset.get('metainfo'), getattr(kind, 'METAINFO', None))

    def find(key: str) -> Any:
        found = [source.get(key) for source in sources if isinstance(source, dict)]
        return next((x for x in found if isinstance(x, (list, tuple)) and len(x) == count), None)

    colours = np.random.RandomState(0).randint(0, 256, (count, 3)).tolist()
    names = find('classes') or range(count)
    return dict(classes=tuple(map(str, names)), palette=find('palette') or colours)


@contextmanager
def loads(content: dict[str, Any]) -> Iterator[None]:
    """Give the code bases this content in place of any local checkpoint file, which they would unpickle."""
    own = CheckpointLoader._get_checkpoint_loader('')
    CheckpointLoader.register_scheme('', loader=lambda *_: content, force=True)
    try:
        yield
    finally:
        CheckpointLoader.register_scheme('', loader=own, force=True)


def init_inferencer(cfg: Config, checkpoint: str, device: str) -> Any:
    """Build the inferencer of the library that a config names, and load a checkpoint as data.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it cannot be read safely, or does not hold the model's weights.
    """
    scope = cfg.get('default_scope')
    if scope not in PREDICT:
        raise ValueError(f'{cfg.filename}: default_scope is {scope!r}, not one of {list(PREDICT)}')
    content = read_checkpoint(checkpoint)
    content = content if isinstance(content, dict) else {}
    weights, meta = content.get('state_dict', content), content.get('meta')
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f'{checkpoint}: it holds no state dict')
    init_default_scope(scope)
    names = find_names(meta.get('dataset_meta') if isinstance(meta, dict) else None, cfg)
    with loads(dict(state_dict=weights, meta=dict(dataset_meta=names))):
        if scope == 'mmpretrain':
            progress: Any = import_module('mmpretrain.utils.progress')
            progress.disable_progress_bar = True
            kind = import_module('mmpretrain').ImageClassificationInferencer
            inferencer = kind(cfg, pretrained='checkpoint', device=device)
        else:
            name = 'DetInferencer' if scope == 'mmdet' else 'MMSegInferencer'
            inferencer = getattr(import_module(f'{scope}.apis'), name)(cfg, 'checkpoint', device=device)
            inferencer.show_progress = False
    own = {k: v.shape for k, v in inferencer.model.state_dict().items() if not k.endswith('batches_tracked')}
    wrong = [name for name, shape in own.items() if getattr(weights.get(name), 'shape', None) != shape]
    if wrong:
        raise ValueError(
            f'{checkpoint}: {len(wrong)} of the {len(own)} weights of {cfg.filename} are missing or of '
            f'another shape, such as {", ".join(wrong[:3])}; give the config that it was trained with '
            '(a published classifier must go through tools/convert_checkpoint.py)'
        )
    return inferencer


def detect(inferencer: Any, path: Path, image: np.ndarray, score_thr: float) -> Prediction:
    sample = inferencer(str(path), return_datasamples=True)['predictions'][0]
    sample.pred_instances = sample.pred_instances[sample.pred_instances.scores.argsort()]  # the surest on top
    picture = inferencer.visualize([str(path)], [sample], return_vis=True, pred_score_thr=score_thr)[0]
    found = inferencer.pred2dict(sample)
    classes = inferencer.model.dataset_meta['classes']
    objects = []
    for i, (label, score) in enumerate(zip(found['labels'], found['scores'])):
        if score >= score_thr:
            box = [round(x, 2) for x in found['bboxes'][i]]
            objects.append({'class': classes[label], 'label': label, 'score': round(score, 4), 'box': box})
            if 'masks' in found:
                objects[-1]['mask'] = found['masks'][i]
    objects.reverse()
    counts = Counter(x['class'] for x in objects).most_common()
    words = ', '.join(f'{count} x {name}' for name, count in counts) or 'nothing'
    return dict(objects=objects), words, picture


def segment(inferencer: Any, path: Path, image: np.ndarray, score_thr: float) -> Prediction:
    sample = inferencer(str(path), return_datasamples=True)
    found = sample.pred_sem_seg
    found.data = found.data.cpu().numpy()  # a tensor of one pixel could not be drawn
    # mmseg writes names with OpenCV, which has ASCII only
    ascii_names = all(name.isascii() for name in inferencer.model.dataset_meta['classes'])
    picture = inferencer.visualize(
        [str(path)], [sample], return_vis=True, opacity=0.6, with_labels=ascii_names
    )[0]
    labels, counts = np.unique(found.data, return_counts=True)
    classes = inferencer.model.dataset_meta['classes']
    segments = [
        {'class': classes[labels[i]], 'label': int(labels[i]), 'share': round(counts[i] / counts.sum(), 4)}
        for i in np.argsort(counts)[::-1]
    ]
    words = ', '.join(f'{x["share"]:.0%} {x["class"]}' for x in segments[:TOP])
    return dict(segments=segments, map=found.data[0]), words, picture


def classify(inferencer: Any, path: Path, image: np.ndarray, score_thr: float) -> Prediction:
    from mmpretrain.visualization import UniversalVisualizer

    sample = inferencer(str(path), return_datasamples=True)[0]
    scores, labels = sample.pred_score.sort(descending=True)
    classes = [
        {'class': inferencer.classes[label], 'label': label, 'score': round(score, 4)}
        for score, label in zip(scores[:TOP].tolist(), labels[:TOP].tolist())
    ]
    picture = UniversalVisualizer().visualize_cls(
        image[..., ::-1], sample, classes=inferencer.classes, rescale_factor=max(1, 224 / max(image.shape))
    )
    return dict(classes=classes), f'{classes[0]["class"]} ({classes[0]["score"]:.2f})', picture


PREDICT = {'mmdet': detect, 'mmseg': segment, 'mmpretrain': classify}


def to_json(value: Any) -> str:
    """JSON with a line for each object found."""
    if isinstance(value, list):
        return f'[{",".join(chr(10) + "    " + to_json(x) for x in value)}]'
    return json.dumps(value, ensure_ascii=False)


def write(out: Path, path: Path, image: np.ndarray, entries: dict[str, Any], picture: np.ndarray) -> None:
    """Write what was found in an image, and the drawn picture."""
    if 'map' in entries:
        mmcv.imwrite(
            entries['map'].astype(np.uint16 if entries['map'].max() > 255 else np.uint8),
            str(out / f'preds/{path.name}.png'),
        )
        entries['map'] = printable(f'preds/{path.name}.png')
    height, width = image.shape[:2]
    entries = dict(image=printable(path), width=width, height=height, **entries)
    name = path.name if path.suffix.lower() in ('.jpg', '.jpeg', '.png') else f'{path.name}.jpg'
    mmcv.imwrite(mmcv.rgb2bgr(picture), str(out / 'vis' / name))
    lines = [f'  {json.dumps(key)}: {to_json(value)}' for key, value in entries.items()]
    (out / f'preds/{path.name}.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


def infer(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike = 'predictions',
    device: str | None = None,
    score_thr: float = 0.3,
) -> list[str]:
    """Run inference on an image or a folder, and save pictures and JSON files.

    Args:
        config: Config of MMDetection, MMSegmentation or MMPretrain.
        checkpoint: Its checkpoint; it is read as data.
        images: Image file, or a folder: all files in it but hidden ones.
        out: Folder to write ``vis/NAME`` and ``preds/NAME.json`` in.
        device: Such as 'cpu' or 'cuda:1'. Defaults to the first GPU, if any.
        score_thr: Detectors: drop lower scores.

    Returns:
        Names of the files that were skipped because they are damaged or not images.

    Raises:
        OSError: If a file does not exist.
        ValueError: If an argument cannot be used, or the checkpoint does not fit the config.
    """
    images, out = Path(images), Path(out)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    paths = list_files(images, out)
    cfg = Config.fromfile(config)
    with redirect_stdout(io.StringIO()):  # the libraries' messages about weights, which are checked here
        inferencer = init_inferencer(cfg, str(checkpoint), device or get_device())
    for name in ('vis', 'preds'):
        (out / name).mkdir(parents=True, exist_ok=True)
    names = (
        inferencer.model.dataset_meta['classes'] if cfg.default_scope != 'mmpretrain' else inferencer.classes
    )
    missing = use_font_for(names)
    if cfg.default_scope == 'mmseg' and not all(name.isascii() for name in names):
        missing = 'class names are not drawn: MMSegmentation has a font with ASCII characters only'
    if missing:
        print(f'note: {missing}', flush=True)
    predict = PREDICT[cfg.default_scope]
    skipped = []
    start = time.time()
    for number, path in enumerate(paths, 1):
        try:
            image = read_image(path)
            entries, words, picture = predict(inferencer, path, image, score_thr)
        except (OSError, RuntimeError, ValueError, cv2.error) as error:
            skipped.append(printable(path.name))
            words = f'skipped, {" ".join(str(error).split())}'
        else:
            write(out, path, image, entries, picture)
        left = timedelta(seconds=round((time.time() - start) / number * (len(paths) - number)))
        line = f'[{number}/{len(paths)}, {left} left] {path.name}: {words}'
        print(printable(line), flush=True)
    print(f'{len(paths) - len(skipped)} pictures in {out}/vis, as JSON in {out}/preds')
    if skipped:
        print(f'{len(skipped)} of {len(paths)} files were skipped: {", ".join(skipped)}', file=sys.stderr)
    return skipped
