"""State dicts to compare, what MMEngine adds to a checkpoint, and pickles that run code."""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def prefixed(prefix, state_dict):
    return OrderedDict((prefix + name, tensor) for name, tensor in state_dict.items())


def other(state_dict):
    """Weights that must not be taken."""
    return {name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}


def assert_equal(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state_dict[name], tensor), name


def logging_objects():
    """What MMEngine adds to a checkpoint."""
    scalars = OrderedDict(loss=HistoryBuffer([1.0, 2.0], [1, 1]))
    info = {'epoch': 1, 'best': np.float64(0.5), 'mean': np.arange(3)}
    return {'log_scalars': scalars, 'runtime_info': info}


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# Name that a refusal tells -> pickle that leaves a mark in a file
BOMBS = {
    'posix.system': lambda m: Call(os.system, f'touch {m}'),
    'builtins.eval': lambda m: Call(eval, f'open({str(m)!r}, "w")'),
    'builtins.exec': lambda m: Call(exec, f'open({str(m)!r}, "w")'),
    'functools.partial': lambda m: Call(partial(os.system, f'touch {m}')),
    'io.open': lambda m: Call(open, str(m), 'w'),
    'torch.hub.download_url_to_file': lambda m: Call(
        torch.hub.download_url_to_file, Path(__file__).as_uri(), str(m), None, False
    ),
    'torch._tensor._rebuild_from_type_v2': lambda m: Call(
        torch._tensor._rebuild_from_type_v2, os.system, object, (f'touch {m}',), {}
    ),
}
