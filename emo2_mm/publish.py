"""Reduce a training checkpoint to a file for publication: weights and plain metadata."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Mapping

from torch import Tensor

from .emov2 import EMOv2
from .version import __version__
from .weights.load import find_arch, find_state_dict, match_weights
from .weights.read import read_checkpoint, restore_colours
from .weights.save import recipe_of, write_weights


def find_weights(content: Any) -> dict[str, Tensor]:
    """The state dict of a whole model; with EMA, MMEngine saves the averaged weights under this key."""
    weights = content.get('state_dict') if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            'it has no state_dict; give a checkpoint of a training run, such as '
            'work_dirs/NAME/epoch_12.pth (convert a released classifier with tools/convert_checkpoint.py)'
        )
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f'{name!r} in its state_dict is not a tensor but {value!r:.60}; remove it')
    return dict(weights)


def find_meta(content: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Collect the metadata of the weights as plain data."""
    known = content.get('meta')
    known = known if isinstance(known, Mapping) else {}
    meta = {
        'arch': find_arch(find_state_dict(weights), EMOv2.arch_settings),
        'recipe': recipe_of(content),
        **{key: known.get(key) for key in ('epoch', 'iter', 'cfg', 'dataset_meta')},
        'emo2_mm_version': __version__,
    }
    # values that are not plain data, such as arrays, are dropped
    plain = json.loads(json.dumps(meta, default=lambda _: None, skipkeys=True))
    if isinstance(plain['dataset_meta'], dict):
        restore_colours(plain['dataset_meta'])
    return {key: value for key, value in plain.items() if value is not None}


def read_backbone_cfg(text: str) -> dict[str, Any]:
    """Read ``model.backbone`` from the text of a config. Only literals and ``dict(...)`` are evaluated.

    Raises:
        ValueError: If there is none.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
            return {keyword.arg: value(keyword.value) for keyword in node.keywords}
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(item) for item in node.elts]
        return ast.literal_eval(node)

    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f'the config in its metadata is no Python: {error}') from None
    for node in statements:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == 'model':
            for keyword in node.value.keywords if isinstance(node.value, ast.Call) else ():
                if keyword.arg == 'backbone':
                    return value(keyword.value)
    raise ValueError('the config in its metadata has no model.backbone')


def is_deployed(weights: Mapping[str, Tensor]) -> bool:
    """Whether the backbone of a whole model is folded."""
    return 'backbone.stem.depthwise.bias' in weights


def fold_weights(weights: dict[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Fold the batch norms of the backbone of a whole model.

    Args:
        weights: Its state dict.
        meta: Its metadata; ``cfg`` tells how the backbone was built.

    Raises:
        ValueError: If the config is missing or does not fit, or the weights are folded already.
    """
    if is_deployed(weights):
        raise ValueError('its weights are deployed already; leave out --deploy')
    if 'cfg' not in meta:
        raise ValueError('it has no config in its metadata, which --deploy needs to build the backbone')
    cfg = read_backbone_cfg(meta['cfg'])
    kind = str(cfg.pop('type', None))
    if kind not in ('EMOv2', 'emo2_mm.EMOv2'):
        raise ValueError(f'its backbone is {kind}; --deploy folds EMOv2 only')
    try:
        backbone = EMOv2(**{**cfg, 'init_cfg': None})
    except TypeError as error:
        raise ValueError(f'the backbone in its config cannot be built: {error}') from None
    prefix = 'backbone.'
    own = {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}
    # counters of batches may be missing, which folding drops
    backbone.load_state_dict(match_weights(own, backbone), strict=False)
    backbone.eval().switch_to_deploy()
    dtype = own['stem.conv.weight'].dtype
    folded = {f'{prefix}{name}': t.to(dtype) for name, t in backbone.state_dict().items()}
    return {**folded, **{name: t for name, t in weights.items() if not name.startswith(prefix)}}


def publish(in_file: Path, out_file: Path, deploy: bool = False) -> str:
    """Write the file; return a line that describes it.

    Args:
        in_file: Checkpoint of a training run.
        out_file: File to write.
        deploy: Fold batch norms; ``deployed`` in the metadata says so.

    Raises:
        OSError: If a file does not exist or cannot be written.
        ValueError: If the input is not a training checkpoint.
    """
    content = read_checkpoint(in_file)
    try:
        weights = find_weights(content)
        meta = find_meta(content, weights)
        if deploy:
            weights = fold_weights(weights, meta)
        if is_deployed(weights):
            meta['deployed'] = True
    except ValueError as error:
        raise ValueError(f'{in_file}: {error}') from None
    path = write_weights(out_file, weights, meta, add_hash=True)
    before, after = (file.expanduser().stat().st_size / 1e6 for file in (in_file, path))
    about = f'arch {meta.get("arch", "custom")}, recipe {meta.get("recipe", "unknown")}'
    about += ', deployed' if 'deployed' in meta else ''
    return f'{path}: {about}, {len(weights)} tensors, {after:.1f} MB ({in_file}: {before:.1f} MB)'
