"""Save weights with their metadata to a file of torch.save or safetensors."""

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
    """Write weights and metadata atomically: the file is complete or not there.

    The same content gives the same bytes in every run.

    Args:
        path: File to write: safetensors if its name ends in ``.safetensors``, else ``torch.save`` of
            ``{'meta': meta, 'state_dict': state_dict}``. Missing folders are created.
        state_dict: Name to tensor.
        meta: Plain data. Safetensors stores text only, so other values become JSON there.
        add_hash: Append the first 8 digits of the file's SHA-256 to its name, as ``torch.hub`` expects:
            ``NAME-1a2b3c4d.pth``.

    Returns:
        Path of the file.

    Raises:
        OSError: If it cannot be written; an existing file stays as it was.
        ValueError: If ``path`` is a folder, or the package safetensors is missing.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f'{path}: a folder; give a name for the file in it')
    # torch.save would store the whole storage of a view, and safetensors refuses views
    state_dict = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    if path.suffix == '.safetensors':
        data = _safetensors(path, state_dict, meta)
    else:
        buffer = io.BytesIO()  # with a path, torch would store the file name
        torch.save({'meta': meta, 'state_dict': state_dict}, buffer)
        data = buffer.getvalue()
    if add_hash:
        path = path.with_name(f'{path.stem}-{sha256(data).hexdigest()[:8]}{path.suffix}')

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        part.write_bytes(data)
        os.replace(part, path)  # atomic: never a partial file under this name
    finally:
        if part.exists():
            part.unlink()
    return path


def recipe_of(content: Any) -> str | None:
    """Name of the config that a checkpoint was trained with; None if its metadata does not tell."""
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    run = re.fullmatch(r'(.+)_\d{8}_\d{6}', str(meta.get('experiment_name')))  # config name and start time
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
    header['__metadata__'] = texts  # safetensors itself writes it in random order
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, 'little') + text + data[start:]
