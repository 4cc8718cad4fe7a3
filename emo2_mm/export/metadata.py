"""What model.json of a bundle says of a model."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from ..errors import UserError
from ..version import __version__
from .loading import Loaded, Options
from .preprocess import preprocess_steps, preprocessor_settings

SCORE_THR = 0.3  # of what predict.py draws


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
    model: Any = loaded.model
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


def describe_anchors(head: Any) -> dict[str, Any]:
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
