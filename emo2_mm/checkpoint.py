"""Weights for the backbone out of any file that may hold them, read without running its code.

A file is read (:func:`read_checkpoint`), its state dict found and named as in
:class:`emo2_mm.EMOv2` (:func:`find_state_dict`), and that must fill the model
(:func:`match_weights`).
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Dict, Mapping
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

Weights = Dict[str, Tensor]

# Where a state dict lies, best first. MMEngine's EMAHook swaps the averaged weights into
# 'state_dict' as it saves, and the raw ones into 'ema_state_dict': that counts only where alone.
WRAPPERS = ('net_E', 'net', 'state_dict_ema', 'state_dict', 'ema_state_dict')

# Published name -> our name, applied in this order; our own names pass unchanged.
RENAMES = (
    (r'^stage0\.0\.(conv|norm)\.', r'stem.\1.'),
    (r'^stage0\.1\.conv\.', 'stem.depthwise.'),
    (r'^stage0\.1\.norm\.', 'stem.depthwise_norm.'),
    (r'^stage0\.2\.conv\.', 'stem.project.'),
    *((rf'^stage{i + 1}\.(\d+)\.', rf'stages.{i}.\1.') for i in range(4)),
    (r'\.eops\.0\.net\.conv\.', '.expand.linear.'),
    (r'\.eops\.0\.(qk|v)\.conv\.', r'.expand.\1.'),
    (r'\.conv_local\.conv\.', '.depthwise.'),
    (r'\.conv_local\.norm\.', '.depthwise_norm.'),
    (r'\.proj\.conv\.', '.project.'),
    (r'\.ls\.gamma$', '.layer_scale'),
    (r'(^|\.)norm\.norm\.', r'\1norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


def load_backbone_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Fill a backbone, in place, with the weights of a file.

    Args:
        model: An :class:`emo2_mm.EMOv2`; its dtype and device stay.
        path: A published file or a checkpoint of MMPretrain, MMDetection, MMSegmentation or
            MMEngine: a local path or an ``http(s)://`` address.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file cannot be read safely, or does not hold the model's weights.
    """
    content = read_checkpoint(path)
    try:
        matched = match_weights(find_state_dict(content), model)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    own = model.state_dict()
    for name, tensor in matched.items():
        own[name].copy_(tensor)
    print_log(f'Loaded {len(matched)} tensors of the backbone from {path}', logger='current')


def find_state_dict(content: Any) -> Weights:
    """Find the weights in what a file holds, and name them as the backbone does.

    Args:
        content: A bare state dict, or a dict that holds one under one of ``WRAPPERS``.

    Returns:
        Name to tensor. Of a whole model only the backbone, without its prefix, and the linear
        classifier ``head.fc`` are kept.

    Raises:
        ValueError: If there is no state dict.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f'it holds a {type(content).__name__}, not a state dict')
    candidates = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    for candidate in [*candidates, content]:
        weights = {
            re.sub(r'^(module\.)+', '', name): value
            for name, value in candidate.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        if weights:
            break
    else:
        raise ValueError(f'it holds no weights; its keys are: {_some(content)}')
    if any(name.startswith('backbone.') for name in weights):
        weights = {
            re.sub(r'^backbone\.', '', name): value
            for name, value in weights.items()
            if name.startswith(('backbone.', 'head.fc.'))
        }
    return {_rename(name): value for name, value in weights.items()}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def match_weights(weights: Weights, model: nn.Module) -> Weights:
    """Bring weights into the shapes of a backbone, and insist that they fill it.

    Left out silently: the classifier, the final norm and the late stages where the model has none,
    and the step counter of an averaged model.

    Args:
        weights: What :func:`find_state_dict` gives.
        model: An :class:`emo2_mm.EMOv2`; it is not changed.

    Returns:
        A tensor for each parameter and buffer of the model; batch counters only if given.

    Raises:
        ValueError: If any is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    matched, missing, misshaped = {}, [], []
    for name, target in own.items():
        tensor = _reshape(weights[name], target.shape) if name in weights else None
        if tensor is not None:
            matched[name] = tensor
        elif name in weights:
            misshaped.append(f'{name} {tuple(weights[name].shape)} for {tuple(target.shape)}')
        elif not name.endswith('num_batches_tracked'):
            missing.append(name)
    unexpected = [name for name in weights if name not in own and not _unused(name, own)]
    if not (missing or misshaped or unexpected):
        return matched

    required = [name for name in own if not name.endswith('num_batches_tracked')]
    fitting = sum(name in matched for name in required)
    lines = [f'{fitting} of {len(required)} weights of {type(model).__name__} were found']
    for label, names in (
        ('missing', missing),
        ('unexpected', unexpected),
        ('of another shape (file for model)', misshaped),
    ):
        if names:
            lines.append(f'{len(names)} {label}: {_some(names)}')
    arch = find_arch(weights, model.arch_settings)
    if arch and arch != find_arch(own, model.arch_settings):
        lines.append(f'the file holds arch {arch!r}; set arch={arch!r}')
    elif arch and misshaped:
        lines.append(
            f'the file has the depths and channels of arch {arch!r} but other shapes, as a network '
            'for other input or EMO (version 1) would'
        )
    elif not fitting:
        lines.append('these are the weights of another network')
    raise ValueError('\n  '.join(lines))


def _reshape(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """View a 1x1 convolution as a linear weight and a (1, C, 1, 1) factor as a (C) vector."""
    published = {1: (1, *shape, 1, 1), 2: (*shape, 1, 1)}.get(len(shape))
    return tensor.reshape(shape) if tuple(tensor.shape) in (shape, published) else None


def _unused(name: str, own: Weights) -> bool:
    """Whether a weight belongs to a part that a backbone with the weights ``own`` lacks."""
    stage = re.match(r'stages\.[0-3]\.', name)
    if stage:
        return not any(known.startswith(stage[0]) for known in own)
    return name.startswith(('head.', 'norm.')) or name == 'steps'


def find_arch(weights: Weights, arch_settings: dict[str, dict[str, Any]]) -> str | None:
    """Name the arch whose depths and channels the weights have, or None."""
    sizes: dict[int, tuple[int, ...]] = {}  # stage: depth, channels
    for name, tensor in weights.items():
        found = re.match(r'stages\.(\d+)\.\d+\.project\.weight$', name)
        if found:
            stage = int(found[1])
            depth = sizes[stage][0] if stage in sizes else 0
            sizes[stage] = (depth + 1, *tensor.shape[:1])
    for arch, settings in arch_settings.items():
        expected = dict(enumerate(zip(settings['depths'], settings['channels'])))
        if sizes and sizes.items() <= expected.items():
            return arch
    return None


def classifier_state_dict(weights: Weights, backbone: nn.Module) -> Weights:
    """Make the state dict of an MMPretrain ``ImageClassifier`` with a ``LinearClsHead``.

    Args:
        weights: What :func:`find_state_dict` gives.
        backbone: An :class:`emo2_mm.EMOv2` with ``final_norm=True``; it is not changed.

    Raises:
        ValueError: If the weights lack the classifier or do not fit the backbone.
    """
    head = {name: weights.get(name) for name in ('head.fc.weight', 'head.fc.bias')}
    if any(tensor is None for tensor in head.values()):
        raise ValueError(
            'it holds no classifier head (head.weight and head.bias), as files of detection and '
            'segmentation; only classification files can be converted'
        )
    matched = match_weights(weights, backbone)
    state_dict = {
        f'backbone.{name}': matched.get(name, tensor).to(tensor.dtype)
        for name, tensor in backbone.state_dict().items()
    }
    return {name: tensor.clone() for name, tensor in {**state_dict, **head}.items()}


def _some(names: Any, limit: int = 4) -> str:
    names = [str(name) for name in names]
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '') or 'none'


# Reading. Only torch's zip format is taken: in the older ones torch before 2.6 runs code of the
# file even under weights_only (CVE-2025-32434).

RESAVE = (
    'if you trust it, read it with torch.load(FILE, weights_only=False) and save the state dict '
    'again with torch.save'
)


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Read a file of :func:`torch.save` without running code of it.

    Args:
        path: A local path, or an ``http(s)://`` address, downloaded once into torch's cache.

    Returns:
        Plain data, and tensors on the CPU. The logging objects of an MMEngine checkpoint are
        replaced by empty ones.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is of another kind, is damaged, or needs code to be run.
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
            return _read_zip(file)
        except Exception as error:  # whatever a damaged or hostile file leads to
            message = f'{type(error).__name__}: {error}'.splitlines()[0]
            raise ValueError(f'{local}: cannot be read: {message}') from error


def _download(url: str) -> Path:
    if urlparse(url).scheme not in ('http', 'https'):
        raise ValueError(f'{url}: give a local path or an http:// or https:// address')
    # Many files are called latest.pth: tell them apart by their whole address.
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


def _wrong_kind(file: BinaryIO) -> str | None:
    """Say what a file is, if it is not a zip archive, and what to do."""
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
    if head[8:9] == b'{':
        return 'a safetensors file, which is not supported; save its tensors with torch.save'
    return f'not a file of torch.save; it starts with {head[:16]!r}'


def _read_zip(file: BinaryIO) -> Any:
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)  # the parser of torch.load: both see the same records
    records = reader.get_all_records()
    if 'constants.pkl' in records:
        raise ValueError('a TorchScript archive, which holds code; save the state_dict() instead')
    if 'data.pkl' not in records:
        raise ValueError('a zip archive, but not one of torch.save')
    _Check(reader).load()
    try:
        file.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1's own use
            return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:  # torch refuses logging objects, which ALLOWED replaces
        file.seek(0)
        return torch.load(file, map_location='cpu', pickle_module=_StateDictPickle)


class _Dropped:
    """Stands for an object that no state dict needs: accepts anything, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Dropped:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """An ``OrderedDict`` to which a file can give no attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Rebuild:
    """A function that a file can call but, unlike a plain one, not change."""

    __slots__ = ('function',)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it changes a function')


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
    """Build a tensor without the hooks and metadata that a file may give it."""
    if isinstance(storage, _Dropped):
        return storage
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


# All that a file may name. What is not here is never imported, so it cannot be called.
ALLOWED = {
    'collections.OrderedDict': _Dict,
    'torch._utils._rebuild_tensor_v2': _Rebuild(_tensor),
    'torch._utils._rebuild_parameter': _Rebuild(lambda tensor, *_: tensor),
    # MMEngine's message hub; getattr is how the methods of a HistoryBuffer are written
    'mmengine.logging.history_buffer.HistoryBuffer': _Dropped,
    '__builtin__.getattr': _Dropped,
    'builtins.getattr': _Dropped,
    'numpy.ndarray': _Dropped,
    'numpy.dtype': _Dropped,
    'numpy.core.multiarray._reconstruct': _Dropped,
    'numpy.core.multiarray.scalar': _Dropped,
    'numpy._core.multiarray._reconstruct': _Dropped,
    'numpy._core.multiarray.scalar': _Dropped,
    '_codecs.encode': _Dropped,
    'collections.Counter': _Dropped,  # a MultiStepLR of MMEngine or torch
    'argparse.Namespace': _Dropped,  # timm's arguments
}
ITEM_BYTES = {
    **{'DoubleStorage': 8, 'FloatStorage': 4, 'HalfStorage': 2, 'BFloat16Storage': 2},
    **{'LongStorage': 8, 'IntStorage': 4, 'ShortStorage': 2, 'CharStorage': 1, 'ByteStorage': 1},
    'BoolStorage': 1,
}


class _StateDictPickle:
    """A ``pickle_module`` for :func:`torch.load`, which adds the storages itself."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f'{module}.{name}' not in ALLOWED:
                raise pickle.UnpicklingError(
                    f'it needs {module}.{name} to be run, which is refused; {RESAVE}'
                )
            return ALLOWED[f'{module}.{name}']


class _Check(_StateDictPickle.Unpickler):
    """Goes through a file without making a tensor: its names, and the size of each storage.

    Torch before 2.10 believes the sizes that a file states, under ``weights_only`` too, and reads
    and writes beyond the data.
    """

    def __init__(self, reader: Any) -> None:
        super().__init__(io.BytesIO(reader.get_record('data.pkl')))
        self.reader = reader

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in ITEM_BYTES:
            return ITEM_BYTES[name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Dropped:
        kind, item_bytes, key, _, count = pid
        if kind != 'storage' or type(key) is not str:
            raise pickle.UnpicklingError(f'it holds {pid}, which is not a storage')
        size = len(self.reader.get_record(f'data/{key}'))
        if size != item_bytes * count:
            raise pickle.UnpicklingError(f'data/{key} has {size} bytes, not {item_bytes * count}')
        return _Dropped()
