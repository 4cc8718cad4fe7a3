"""Read a checkpoint file as plain data, without executing any of it.

Supported are safetensors, which can hold nothing but tensors, and torch's zip format. Torch's older formats
are refused: torch before 2.6 executes code of such files even with ``weights_only=True`` (CVE-2025-32434).
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log

from .unpickle import RESAVE, CheckStorages, StateDictPickle

META_JSON = {'epoch': int, 'iter': int, 'dataset_meta': dict}  # JSON texts in the metadata of safetensors


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Read a file of :func:`torch.save` or of safetensors without executing code from it.

    Args:
        path: A local path, or an ``http(s)://`` address, downloaded once into torch's cache.

    Returns:
        Plain data, and tensors on the CPU. NumPy scalars become Python numbers; NumPy arrays and the
        logging objects of an MMEngine checkpoint become empty placeholders. A file of safetensors gives
        ``state_dict`` and, from its metadata, ``meta``.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is of another kind, is damaged, or would need code to be executed.
        ImportError: If it is a safetensors file and the package safetensors is not installed.
    """
    local = _download(str(path)) if '://' in str(path) else Path(path).expanduser()
    if local.is_dir():
        raise IsADirectoryError(f'{path}: a folder; give the checkpoint file in it')
    if not local.exists():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    with local.open('rb') as file:
        problem = _wrong_kind(file)
        if problem:
            raise ValueError(f'{local}: {problem}')
        try:
            return _read_safetensors(local) if _is_safetensors(file) else _read_zip(file)
        except ImportError:
            raise
        except Exception as error:  # a damaged or malicious file may raise anything
            message = f'{type(error).__name__}: {error}'.splitlines()[0]
            raise ValueError(f'{local}: cannot be read: {message}') from error


def _download(url: str) -> Path:
    if urlparse(url).scheme not in ('http', 'https'):
        raise ValueError(f'{url}: give a local path or an http:// or https:// address')
    # Many files are called latest.pth: the hash of the whole address tells them apart.
    name = f'{sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print_log(f'Downloading {url} to {target}', logger='current')
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:
            raise OSError(f'{url}: download failed: {error}') from error
    return target


def _is_safetensors(file: BinaryIO) -> bool:
    """Whether a file starts with the length of a JSON object and that object."""
    file.seek(0)
    return file.read(9)[8:] == b'{'


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f'{path} is a safetensors file: `pip install safetensors` to read it') from error
    with safe_open(path, 'pt') as file:
        state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta: dict[str, Any] = file.metadata() or {}
    for name, kind in META_JSON.items():
        with suppress(KeyError, RecursionError, ValueError):  # text that another program wrote
            value = json.loads(meta[name])
            meta[name] = value if type(value) is kind else meta[name]
    if isinstance(meta.get('dataset_meta'), dict):
        restore_colours(meta['dataset_meta'])
    return {'state_dict': state_dict, 'meta': meta}


def restore_colours(dataset_meta: dict[str, Any]) -> None:
    """Convert the colours of a palette to tuples, in place: JSON has lists, MMDetection needs tuples."""
    palette = dataset_meta.get('palette')
    if isinstance(palette, list):
        dataset_meta['palette'] = [
            tuple(colour) if isinstance(colour, list) else colour for colour in palette
        ]


def _wrong_kind(file: BinaryIO) -> str | None:
    """Describe a file that is neither safetensors nor a zip archive, and the remedy; None if it is one."""
    if _is_safetensors(file):
        return None
    file.seek(0)
    head = file.read(512)
    if head.startswith(b'PK\x03\x04'):
        if zipfile.is_zipfile(file):
            return None
        return 'the end of the file is missing; copy or download it again'
    if not head:
        return 'the file is empty; copy or download it again'
    if head.startswith(b'version https://git-lfs'):
        return 'a pointer of Git LFS, not the weights; fetch them with `git lfs pull`'
    if head.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
        return 'a web page (HTML or XML), not weights; delete it and download the file itself'
    if head[257:262] == b'ustar':
        return f"torch's old tar format, which cannot be read safely; {RESAVE}"
    if head.startswith(b'\x80'):
        return f"a bare pickle or torch's format before 1.6, which cannot be read safely; {RESAVE}"
    return f'not a file of torch.save or safetensors; it starts with {head[:16]!r}'


def _read_zip(file: BinaryIO) -> Any:
    file.seek(0)
    # The parser that torch.load uses: both see the same records. The hints of torch 2.1 lack its methods
    reader: Any = torch._C.PyTorchFileReader(file)
    records = reader.get_all_records()
    if 'constants.pkl' in records:
        raise ValueError('a TorchScript archive, which contains code; save the state_dict() instead')
    if 'data.pkl' not in records:
        raise ValueError('a zip archive, but not one of torch.save')
    CheckStorages(reader).load()
    try:
        file.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1 uses it itself
            return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:  # torch refuses MMEngine's logging objects; ALLOWED replaces them
        file.seek(0)
        return torch.load(file, map_location='cpu', pickle_module=StateDictPickle)
