"""Reduce a training checkpoint to a file for publication: weights and plain metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from torch import Tensor

from .emov2 import EMOv2
from .version import __version__
from .weights.load import find_arch, find_state_dict
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


def publish(in_file: Path, out_file: Path) -> str:
    """Write the file; return a line that describes it.

    Raises:
        OSError: If a file does not exist or cannot be written.
        ValueError: If the input is not a training checkpoint.
    """
    content = read_checkpoint(in_file)
    try:
        weights = find_weights(content)
        meta = find_meta(content, weights)
    except ValueError as error:
        raise ValueError(f'{in_file}: {error}') from None
    path = write_weights(out_file, weights, meta, add_hash=True)
    before, after = (file.expanduser().stat().st_size / 1e6 for file in (in_file, path))
    about = f'arch {meta.get("arch", "custom")}, recipe {meta.get("recipe", "unknown")}'
    return f'{path}: {about}, {len(weights)} tensors, {after:.1f} MB ({in_file}: {before:.1f} MB)'
