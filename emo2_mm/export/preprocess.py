"""The test pipeline of a config as steps that predict.py of a bundle executes."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from ..analysis.complexity import height_width, test_pipeline
from ..errors import UserError

IGNORED = ('LoadImageFromFile', 'LoadAnnotations', 'PackInputs', 'PackDetInputs', 'PackSegInputs')
INTERPOLATIONS = {
    'cv2': ('bilinear', 'nearest'),  # what predict.py computes without OpenCV
    'pillow': ('nearest', 'bilinear', 'bicubic', 'box', 'lanczos', 'hamming'),
}


def preprocessor_settings(cfg: Config) -> dict[str, Any]:
    """Mean, std, order of colors and divisor, as the libraries' data preprocessors use them."""
    found = dict(cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {})
    swapped = any(found.get(key) for key in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr'))
    return {
        'color_order': 'RGB' if swapped else 'BGR',
        'mean': [float(x) for x in found.get('mean') or [0.0] * 3],  # of pixels of 0 to 255
        'std': [float(x) for x in found.get('std') or [1.0] * 3],
        # a segmentor pads while training only
        'size_divisor': int(found.get('pad_size_divisor', 1)) if cfg.get('default_scope') != 'mmseg' else 1,
    }


def _resize(transform: dict[str, Any], step: dict[str, Any], size: tuple[int, int] | None) -> None:
    keep = bool(transform.get('keep_ratio', False))
    step.update(op='resize', keep_ratio=keep)
    if transform.get('scale') is not None:
        height, width = height_width(transform['scale'])
        step['scale'] = [width, height]
        if not keep and size:
            step['scale'] = [size[1], size[0]]
    else:
        factor = transform.get('scale_factor')
        if not isinstance(factor, (int, float)):
            raise UserError(
                f'Resize in the test pipeline has scale_factor={factor}; give one number, or scale'
            )
        step['factor'] = float(factor)


def preprocess_steps(cfg: Config, size: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Translate the test pipeline of a config; ``predict.apply_step`` explains the steps.

    Args:
        cfg: The config.
        size: Height and width of the model's input; None for any. Where the pipeline keeps the aspect ratio,
            the image is also shrunk to fit and padded; without it, it is resized to exactly this size.

    Raises:
        UserError: If a transform has no counterpart in predict.py.
    """
    steps: list[dict[str, Any]] = []
    for transform in test_pipeline(cfg):
        kind = str(transform['type']).split('.')[-1]  # it may carry a scope
        step: dict[str, Any] = {}
        if kind in IGNORED:
            continue
        if kind in ('Resize', 'ResizeEdge'):
            backend = transform.get('backend', 'cv2')
            step.update(backend=backend, interpolation=transform.get('interpolation', 'bilinear'))
            if step['interpolation'] not in INTERPOLATIONS.get(backend, ()):
                raise UserError(
                    f'the test pipeline resizes by {step["interpolation"]} of {backend}, which predict.py '
                    f'does not have; it has {INTERPOLATIONS}'
                )
            if kind == 'Resize':
                _resize(transform, step, size)
            else:
                step.update(op='resize_edge', scale=transform['scale'], edge=transform.get('edge', 'short'))
        elif kind == 'CenterCrop':
            height, width = height_width(transform['crop_size'])
            step.update(op='center_crop', size=[width, height])
        elif kind == 'Pad':
            value = transform.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, dict) else value
            step.update(op='pad', value=value, square=bool(transform.get('pad_to_square', False)))
            if transform.get('size') is not None:
                step['size'] = list(transform['size'])
            if transform.get('size_divisor'):
                step['divisor'] = int(transform['size_divisor'])
        else:
            raise UserError(f'the test pipeline has {kind}, which predict.py does not have; export --raw')
        steps.append(step)
    return _fit(steps, cfg.get('default_scope'), size) if size else steps


def _fit(steps: list[dict[str, Any]], scope: str | None, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Steps whose result never exceeds a fixed size of the model, and of a classifier is just that size."""
    height, width = size
    resizes = [step for step in steps if step['op'] == 'resize']
    crops = [step for step in steps if step['op'] == 'center_crop']
    if crops and crops[-1]['size'] != [width, height]:
        ratio = min(size) / min(crops[-1]['size'])
        crops[-1]['size'] = [width, height]
        for step in steps:
            if step['op'] == 'resize_edge':
                step['scale'] = max(round(step['scale'] * ratio), *size)
    elif resizes:
        resizes[-1]['fit'] = [width, height]
    elif not crops:
        step = dict(op='resize', backend='cv2', interpolation='bilinear')
        if scope == 'mmpretrain':
            step.update(keep_ratio=False, scale=[width, height])
        else:
            step.update(keep_ratio=True, factor=1.0, fit=[width, height])
        steps.insert(0, step)
    return steps
