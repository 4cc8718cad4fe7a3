"""Count the parameters and multiply-adds of a config's model; no dataset is needed."""

from __future__ import annotations

from importlib import import_module
from math import ceil, prod
from typing import Any, Sequence

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..config import innermost_dataset

EXTRAS = {'mmpretrain': 'cls', 'mmdet': 'det', 'mmseg': 'seg'}


def count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count ``scaled_dot_product_attention`` as the two matrix products that it stands for."""
    query, key, value = (get_shape(i) for i in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def count_nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


# Beside mmengine's own, which are fvcore's. A global average pooling multiplies nothing; it would
# count in one spelling (adaptive_avg_pool2d), but not in that of the published table (mean).
OP_HANDLES = {
    'aten::scaled_dot_product_attention': count_attention,
    'aten::adaptive_avg_pool2d': count_nothing,
}


def default_shape(cfg: Config) -> tuple[int, int]:
    """Find the (height, width) at which the published tables count a config's model.

    The crop of a segmentor; else what the test pipeline makes of an image. Where that keeps the
    aspect ratio, the short side by 8/5 of it (800 x 1280 of COCO's (1333, 800)); padded where the
    detector pads.

    Raises:
        ValueError: If the config fixes no size.
    """
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if preprocessor.get('size'):
        height, width = preprocessor['size']
        return height, width
    shape = None
    for transform in test_pipeline(cfg):
        kind = str(transform['type']).split('.')[-1]  # it may carry a scope
        if kind == 'CenterCrop':
            shape = height_width(transform['crop_size'])
        elif kind == 'Resize' and 'scale' in transform:
            shape = height_width(transform['scale'])
            if transform.get('keep_ratio'):
                short, long = sorted(shape)
                shape = short, min(long, short * 8 // 5)
    if shape is None:
        raise ValueError('its test pipeline fixes no image size; give one with --shape H W')
    multiple = preprocessor.get('pad_size_divisor', 1)
    return ceil(shape[0] / multiple) * multiple, ceil(shape[1] / multiple) * multiple


def test_pipeline(cfg: Config) -> list[dict[str, Any]]:
    dataset = innermost_dataset(cfg.get('test_dataloader', {}).get('dataset', {}))
    return dataset.get('pipeline', [])


def height_width(size: Any) -> tuple[int, int]:
    """Read the size of a transform: one number or (width, height)."""
    return (size, size) if isinstance(size, int) else (size[1], size[0])


def checked(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ValueError(f'shape is {list(shape)}; give height and width, or one number for both')
    return shape[0], shape[-1]


def build(model_cfg: dict[str, Any]) -> nn.Module:
    """Build a model in eval mode with random weights: nothing is loaded."""
    model_cfg = dict(model_cfg)
    if 'teacher' in model_cfg:  # a distilled classifier is its student
        student: dict[str, Any] = {
            key: model_cfg[key] for key in ('backbone', 'neck', 'head') if key in model_cfg
        }
        model_cfg = {'type': 'ImageClassifier', **student}
    model = MODELS.build(model_cfg)
    return revert_sync_batchnorm(model).eval()  # SyncBN may refuse to work on a CPU


def fix_proposals(model: Any, shape: tuple[int, int]) -> None:
    """Let a region proposal network always give the most proposals that its config allows.

    With random weights NMS would leave a random number.
    """
    rpn = model.rpn_head
    box = torch.tensor([[0.0, 0.0, shape[1], shape[0]]])

    def predict(features: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> list[InstanceData]:
        # The boxes must depend on the network's output: a trace leaves out what leads nowhere.
        nothing = 0 * sum(level.sum() for maps in rpn(features) for level in maps)
        return [InstanceData(bboxes=box.repeat(model.test_cfg.rpn.max_per_img, 1) + nothing)]

    rpn.predict = predict


def analyzer(model: nn.Module, image: Tensor) -> FlopAnalyzer:
    """Make a counter of the multiply-adds of ``model(image)``."""
    counter = FlopAnalyzer(model, image).set_op_handle(**OP_HANDLES)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def count_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count(
    config: str,
    shape: Sequence[int] | None = None,
    cfg_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Count what a model has and what it computes for one image, from pixels to the last layer.

    As in the published tables: multiply-adds of convolutions, linear layers and matrix products,
    and what fvcore counts for norms and bilinear resizing. Not counted are activations and other
    elementwise operations, pooling, and all after the last layer (boxes, NMS, masks).

    Args:
        config: Path of a config of MMPretrain, MMDetection or MMSegmentation.
        shape: Height and width of the image in pixels, or one number for both. Defaults to
            :func:`default_shape`.
        cfg_options: Settings to override in the config.

    Returns:
        A dict with ``params``; ``params_inference``, without those of auxiliary heads; ``flops``,
        the multiply-adds; ``shape``, height and width; ``parts``, parameters and multiply-adds of
        each part of the model; ``skipped``, names of the operations that were not counted.

    Raises:
        ValueError: If the config has no model or fixes no size, or its code base is not installed.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(cfg_options or {})
    if 'model' not in cfg:
        raise ValueError('it has no model')
    scope = cfg.get('default_scope', 'mmengine')
    try:
        import_module(scope)
    except ModuleNotFoundError as error:
        if error.name != scope:
            raise
        remedy = f'; install emo2_mm[{EXTRAS[scope]}]' if scope in EXTRAS else ''
        raise ValueError(f'it needs {scope}, which is not installed{remedy}') from None

    height, width = checked(shape) if shape else default_shape(cfg)
    with DefaultScope.overwrite_default_scope(scope), torch.no_grad():
        model = build(cfg.model)
        if getattr(model, 'with_rpn', False):
            fix_proposals(model, (height, width))
        counter = analyzer(model, torch.zeros(1, 3, height, width))
        flops = counter.by_module()

    params = {name: count_params(child) for name, child in model.named_children()}
    total = count_params(model)
    return dict(
        params=total,
        params_inference=total - params.get('auxiliary_head', 0),
        flops=flops[''],
        shape=[height, width],
        parts={name: (number, flops[name]) for name, number in params.items() if number},
        skipped=sorted(name.split(':')[-1] for name in counter.unsupported_ops()),
    )


def table(sizes: dict[str, Any]) -> str:
    """Lay the sizes out for people, in millions (M) or billions (G)."""
    height, width = sizes['shape']
    unit, factor = ('G', 1e9) if sizes['flops'] >= 1e10 else ('M', 1e6)
    rows = [(name, *numbers) for name, numbers in sizes['parts'].items()]
    rows.append(('total', sizes['params'], sizes['flops']))
    if sizes['params_inference'] != sizes['params']:
        rows.append(('without auxiliary heads', sizes['params_inference'], sizes['flops']))
    lines = [f'one image of {height} x {width} (height x width)', '']
    lines.append(f'{"":24}{"parameters":>18}{"multiply-adds":>24}')
    for name, params, flops in rows:
        lines.append(f'{name:24}{params / 1e6:16.3f} M{flops / factor:22.3f} {unit}')
    lines += ['', f'not counted: {", ".join(sizes["skipped"])}']
    return '\n'.join(lines)
