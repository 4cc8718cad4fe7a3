"""Unpickle a checkpoint with an allow-list of harmless classes; nothing else is imported or called.

It serves files that torch's own ``weights_only`` mode refuses (MMEngine's logging objects), and checks the
sizes of storages, which torch before 2.10 does not.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import Counter
from typing import Any

import torch

RESAVE = (
    'if you trust it, read it with torch.load(FILE, weights_only=False) and save the state dict '
    'again with torch.save'
)


class _Dropped:
    """Placeholder for an object that a state dict does not need; ignores its arguments and state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Dropped:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """Replaces ``OrderedDict``; a file cannot set attributes on it."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Rebuild:
    """Function that a file can call but not modify, as it could a plain Python function."""

    __slots__ = ('function',)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it modifies a function')


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
    """Build a tensor; hooks and metadata from the file are dropped."""
    if isinstance(storage, _Dropped):
        return storage
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


class _NumberType:
    """NumPy dtype, given by its code such as 'f8'; of its state only the byte order is kept."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.swapped = isinstance(state, tuple) and '>' in state


def _number(kind: Any, data: Any) -> Any:
    """NumPy scalar -> Python number (e.g. ``best_score``)."""
    size = NUMBER_FORMATS.get(getattr(kind, 'code', ''))
    if size is None or type(data) is not bytes:
        return _Dropped()
    return struct.unpack(('>' if getattr(kind, 'swapped', False) else '<') + size, data)[0]


NUMBER_FORMATS = {
    **{'f8': 'd', 'f4': 'f', 'f2': 'e', 'i8': 'q', 'i4': 'i', 'i2': 'h', 'i1': 'b'},
    **{'u8': 'Q', 'u4': 'I', 'u2': 'H', 'u1': 'B', 'b1': '?'},
}

# The allow-list. Whatever is not here is never imported, so it cannot be called.
ALLOWED = {
    'collections.OrderedDict': _Dict,
    'torch._utils._rebuild_tensor_v2': _Rebuild(_tensor),
    'torch._utils._rebuild_parameter': _Rebuild(lambda tensor, *_: tensor),
    # MMEngine's message hub; pickle stores the methods of a HistoryBuffer through getattr
    'mmengine.logging.history_buffer.HistoryBuffer': _Dropped,
    '__builtin__.getattr': _Dropped,
    'builtins.getattr': _Dropped,
    'numpy.ndarray': _Dropped,
    'numpy.dtype': _NumberType,
    'numpy.core.multiarray._reconstruct': _Dropped,
    'numpy.core.multiarray.scalar': _Rebuild(_number),
    'numpy._core.multiarray._reconstruct': _Dropped,
    'numpy._core.multiarray.scalar': _Rebuild(_number),
    '_codecs.encode': _Rebuild(lambda text, _: text.encode('latin1')),  # the bytes of a scalar
    'collections.Counter': _Rebuild(lambda counts=(): Counter(dict(counts))),  # milestones of MultiStepLR
    'argparse.Namespace': _Dropped,  # training arguments of timm
    '__builtin__.set': _Dropped,
    'builtins.set': _Dropped,
    'pathlib.PosixPath': _Dropped,
    'torch.device': _Dropped,
    'torch.Size': _Dropped,
    **{
        f'torch.{name}': _Dropped
        for name in ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'uint8', 'bool')
    },
}
ITEM_BYTES = {
    **{'DoubleStorage': 8, 'FloatStorage': 4, 'HalfStorage': 2, 'BFloat16Storage': 2},
    **{'LongStorage': 8, 'IntStorage': 4, 'ShortStorage': 2, 'CharStorage': 1, 'ByteStorage': 1},
    'BoolStorage': 1,
}


class StateDictPickle:
    """A ``pickle_module`` for :func:`torch.load`, which resolves the storages itself."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f'{module}.{name}' not in ALLOWED:
                raise pickle.UnpicklingError(
                    f'{module}.{name} is not on the allow-list; refused (nothing was executed); {RESAVE}'
                )
            return ALLOWED[f'{module}.{name}']


class CheckStorages(StateDictPickle.Unpickler):
    """Check the names in a file and the size of each storage, without building a tensor.

    Torch before 2.10 trusts the sizes that a file states, also with ``weights_only=True``, and reads and
    writes out of bounds.
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
            raise pickle.UnpicklingError(f'it contains {pid}, which is not a storage')
        size = len(self.reader.get_record(f'data/{key}'))
        if size != item_bytes * count:
            raise pickle.UnpicklingError(f'data/{key} has {size} bytes, not {item_bytes * count}')
        return _Dropped()
