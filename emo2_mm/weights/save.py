"""Weights to hand on, in a file: what tools/publish_model.py and tools/convert_checkpoint.py write."""

from __future__ import annotations

import io
import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import Tensor


def write_weights(
    path: Path, state_dict: dict[str, Tensor], meta: dict[str, Any], add_hash: bool = False
) -> Path:
    """Write weights and what is known of them, whole or not at all.

    The same content gives the same bytes, in every run.

    Args:
        path: File to write: of safetensors if its name ends in ``.safetensors``, else of ``torch.save``, as
            ``{'meta': meta, 'state_dict': state_dict}``. Missing folders are made.
        state_dict: Name to tensor.
        meta: Plain data. What is not text becomes JSON in a file of safetensors, which knows text only.
        add_hash: Whether the first 8 digits of the file's SHA-256 go into its name, as in
            ``NAME-1a2b3c4d.pth``, where ``torch.hub`` looks for them.

    Returns:
        The path written.

    Raises:
        OSError: If it cannot be written; what was there stays.
        ValueError: If ``path`` is a folder, or the package safetensors is missing.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f'{path}: a folder; give a name for the file in it')
    # a view would bring along all it is a view of, and safetensors takes none
    state_dict = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    if path.suffix == '.safetensors':
        data = _safetensors(path, state_dict, meta)
    else:
        buffer = io.BytesIO()  # given a path, torch would write its name into the file
        torch.save({'meta': meta, 'state_dict': state_dict}, buffer)
        data = buffer.getvalue()
    if add_hash:
        path = path.with_name(f'{path.stem}-{sha256(data).hexdigest()[:8]}{path.suffix}')

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        part.write_bytes(data)
        os.replace(part, path)  # there is never half a file under this name
    finally:
        if part.exists():
            part.unlink()
    return path


def recipe_of(content: Any) -> str | None:
    """Name the config that a checkpoint was trained with, if it says so itself."""
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    run = re.fullmatch(r'(.+)_\d{8}_\d{6}', str(meta.get('experiment_name')))  # config and begin of a run
    recipe = run[1] if run else meta.get('recipe')
    return recipe if isinstance(recipe, str) else None


def _safetensors(path: Path, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError(f'{path}: `pip install safetensors` to write such a file') from None
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    data = save(state_dict, texts)
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    header['__metadata__'] = texts  # safetensors writes it in another order each time
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, 'little') + text + data[start:]
