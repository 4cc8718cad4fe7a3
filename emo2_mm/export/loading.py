"""What is exported, and the model of a config with its weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

from ..config import innermost_dataset
from ..emov2 import EMOv2
from ..errors import UserError
from ..weights.load import load_backbone_weights
from ..weights.read import read_checkpoint


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
    dataset = innermost_dataset(cfg.get('test_dataloader', {}).get('dataset', {}))
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
    copied: Any = deepcopy(model)
    (copied if isinstance(copied, EMOv2) else copied.backbone).switch_to_deploy()
    return copied
