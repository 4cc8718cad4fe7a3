"""Attention maps: what one point of an image attends to, in its neighbour and its distant window.

There is a row for each stage that attends (strides 16 and 32). The token at the point looks at two windows:
the neighbour window of adjacent tokens, and the distant window of tokens spread over the whole image. The
attention is the mean over heads and blocks of the stage; the most attended token of a panel is the brightest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import Tensor, nn

from ..attention import SEWMHSA, split_windows
from ..config import innermost_dataset
from ..emov2 import EMOv2
from ..weights.load import load_backbone_weights

NEIGHBOUR, DISTANT = 'tab:orange', '#5ab4ff'


class Stage(NamedTuple):
    """What a token attends to in one stage, mean over heads and blocks.

    ``shape`` is the map's (height, width) in tokens, ``maps`` the attention (2, H, W) to the neighbour and
    the distant window: of the padded map, NaN outside of the window.
    """

    stride: int
    blocks: int
    shape: tuple[int, int]
    maps: np.ndarray


def attend(q: Tensor, k: Tensor) -> Tensor:
    """Attention (..., n, m) of queries (..., n, d) to keys (..., m, d)."""
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


def attention_of(token: tuple[int, int], qk: Tensor, size: int, heads: int) -> Tensor:
    """Find what a token attends to, mean over heads.

    Args:
        token: Its row and column.
        qk: Queries and keys of a padded map, (1, H, W, 2 * channels).
        size: Side of a window, in tokens.
        heads: Number of attention heads.

    Returns:
        Attention (2, H, W) to the neighbour and the distant window, NaN outside of them.
    """
    _, h, w, c = qk.shape
    numbers = torch.arange(h * w).view(1, h, w, 1)
    windows = split_windows(numbers, size, heads=1).view(2, -1, size**2)
    shape = (2, -1, heads, size**2, c // 2 // heads)
    q, k = (split_windows(x, size, heads).view(shape) for x in qk.chunk(2, dim=-1))
    maps = qk.new_full((2, h * w), math.nan)
    for kind in range(2):
        window, place = (windows[kind] == token[0] * w + token[1]).nonzero()[0]
        attention = attend(q[kind, window, :, place, None], k[kind, window])  # (heads, 1, tokens)
        maps[kind, windows[kind, window]] = attention.mean(0)[0]
    return maps.view(2, h, w)


@torch.no_grad()
def look(backbone: EMOv2, x: Tensor, point: tuple[float, float]) -> list[Stage]:
    """Find what the token at a point attends to in each stage that attends.

    Args:
        backbone: In eval mode.
        x: One normalised image, (1, 3, H, W).
        point: (x, y) in its pixels.
    """
    caught: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: Any, out: Tensor) -> None:
        caught[layer] = out

    attending = [[b.expand for b in stage if isinstance(b.expand, SEWMHSA)] for stage in backbone.stages]
    hooks = [module.qk.register_forward_hook(keep) for stage in attending for module in stage]
    backbone(x)
    for hook in hooks:
        hook.remove()
    stages = []
    for i, modules in enumerate(attending):
        if modules:
            stride = 4 * 2**i
            token = int(point[1] // stride), int(point[0] // stride)
            maps = [attention_of(token, caught[m.qk], m.window_size, m.heads) for m in modules]
            shape = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
            stages.append(Stage(stride, len(modules), shape, torch.stack(maps).mean(0).numpy()))
    return stages


def resize(image: np.ndarray, cfg: Config) -> np.ndarray:
    """Bring an image (H, W, 3) to the size that the config tests at, whole: crops are left out."""
    init_default_scope(cfg.default_scope)
    for step in innermost_dataset(cfg.test_dataloader.dataset).pipeline:
        if 'Resize' in step.type:
            image = TRANSFORMS.build(step)(dict(img=image))['img']
    return image


def normalise(image: np.ndarray, cfg: Config) -> Tensor:
    """Make the network's input (1, 3, H, W) of an RGB image, as the config's preprocessor does."""
    settings = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    if not (settings.get('bgr_to_rgb') or settings.get('to_rgb')):
        image = image[..., ::-1]
    mean, std = (np.array(settings[key], np.float32) for key in ('mean', 'std'))
    x = torch.from_numpy((image - mean) / std).permute(2, 0, 1)[None]
    multiple = settings.get('pad_size_divisor', 1)
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple))


def draw_neighbour(ax: Any, stage: Stage, width: int, height: int) -> None:
    """Outline the neighbour window, within an image of this size."""
    rows, columns = np.nonzero(np.isfinite(stage.maps[0])) * np.array(stage.stride)
    x, y = columns.min(), rows.min()
    right, bottom = min(columns.max() + stage.stride, width), min(rows.max() + stage.stride, height)
    ax.add_patch(
        Rectangle(
            (x, y), right - x, bottom - y, fill=False, edgecolor=NEIGHBOUR, linewidth=2.5, clip_on=False
        )
    )


def draw_distant(ax: Any, stage: Stage, **kwargs: Any) -> None:
    """Outline each token of the distant window."""
    places = np.argwhere(np.isfinite(stage.maps[1])) * stage.stride
    boxes = [Rectangle((x, y), stage.stride, stage.stride) for y, x in places]
    ax.add_collection(PatchCollection(boxes, edgecolor=DISTANT, linewidth=0.9, **kwargs))


def draw_attention(ax: Any, stage: Stage, kind: int) -> None:
    """Lay the attention to a window over an image, and say how much the brightest token has."""
    attention, (rows, columns) = stage.maps[kind], stage.shape
    inside = attention[:rows, :columns]  # what lies beyond is padding
    heat = np.nan_to_num(attention / np.nanmax(inside)).clip(0, 1)
    colours = colormaps['inferno'](heat)
    colours[..., 3] = np.where(np.isnan(attention), 0, 0.15 + 0.8 * heat)
    height, width = np.array(attention.shape) * stage.stride
    ax.imshow(colours, extent=(0, width, height, 0), interpolation='nearest')
    text = f'brightest token {np.nanmax(inside):.1%}  (even: {1 / np.isfinite(attention).sum():.1%})'
    padding = 1 - np.nansum(inside)
    ax.set_xlabel(text + (f'  padding {padding:.0%}' if padding > 0.005 else ''), fontsize=9)


def draw(stages: list[Stage], image: np.ndarray, point: tuple[float, float], path: Path) -> None:
    """Draw a row for each stage: the two windows, and the attention to the one and to the other."""
    h, w = image.shape[:2]
    size = (12, len(stages) * (3.5 * min(h / w, 3) + 0.3) + 0.3)
    fig = Figure(size, layout='compressed')
    axes = fig.subplots(len(stages), 3, squeeze=False)
    for stage, row in zip(stages, axes):
        row[0].imshow(image)
        draw_distant(row[0], stage, facecolor=(0.35, 0.7, 1, 0.3))
        draw_neighbour(row[0], stage, w, h)
        side = math.isqrt(np.isfinite(stage.maps[0]).sum())
        row[0].set_ylabel(
            f'stride {stage.stride}, {stage.blocks} blocks\n'
            f'{stage.shape[0]} x {stage.shape[1]} tokens\nwindows of {side} x {side}',
            fontsize=10,
            rotation=0,
            ha='right',
            va='center',
        )
        for kind, ax in enumerate(row[1:]):
            ax.imshow((image * 0.4).astype(np.uint8))
            draw_attention(ax, stage, kind)
        draw_neighbour(row[1], stage, w, h)
        draw_distant(row[2], stage, facecolor='none')
        for ax in row:
            ax.plot(*point, '+', color='black', markersize=16, markeredgewidth=5)
            ax.plot(*point, '+', color='white', markersize=14, markeredgewidth=2.5)
            ax.set(xlim=(0, w), ylim=(h, 0), xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    titles = (
        'the two windows of a point',
        'attention to the neighbour window',
        'attention to the distant window',
    )
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches='tight')


def show(config: str, checkpoint: str, image_file: str, point: tuple[float, float] | None, out: Path) -> None:
    """Draw what one point of an image attends to.

    Args:
        config: Config file of a classifier, detector or segmentor on EMOv2.
        checkpoint: Its checkpoint, or released weights of the backbone.
        image_file: Image file.
        point: (x, y) in pixels of the image. Defaults to its centre.
        out: Picture to write.

    Raises:
        OSError: If a file does not exist.
        ValueError: If the image cannot be read, the point is outside of it, or the backbone is not EMOv2.
    """
    cfg = Config.fromfile(config)
    original = cv2.imread(image_file)
    if original is None:
        raise ValueError(f'{image_file}: no such file, or not an image')
    h, w = original.shape[:2]
    x, y = point or (w / 2, h / 2)
    if not (0 <= x < w and 0 <= y < h):
        raise ValueError(f'--point is {x:g} {y:g}, but {image_file} is {w} x {h} (width x height)')
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    if not isinstance(backbone, EMOv2):
        raise ValueError(f'{config}: its backbone is {type(backbone).__name__}, not EMOv2')
    load_backbone_weights(backbone, checkpoint)
    image = resize(original[..., ::-1], cfg)
    scaled = x * image.shape[1] / w, y * image.shape[0] / h
    draw(look(backbone.eval(), normalise(image, cfg), scaled), image, scaled, out)
