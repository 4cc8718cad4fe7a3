"""The network that is exported is EMOv2, with tensors of rank 4 at most."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from helpers.networks import TINY, deployed, relative, visible
from torch import nn

from emo2_mm import EMOv2
from emo2_mm.export import onnx_network
from emo2_mm.export.onnx_network import OnnxEMOv2, WindowAttention, replace, trace

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


class Rank7(WindowAttention):
    """The windows as the paper has them, in one permutation of seven axes: what rank 4 is compared with."""

    def split(self, x, channels, n1, n2, distant):
        size, heads, d = self.size, self.heads, channels // self.heads
        if distant:
            x = x.reshape(-1, size, n1, size, n2, heads, d).permute(0, 2, 4, 5, 1, 3, 6)
        else:
            x = x.reshape(-1, n1, size, n2, size, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(-1, heads, size * size, d)

    def merge(self, x, n1, n2, distant):
        size, heads, channels = self.size, self.heads, self.v.out_features
        x = x.reshape(-1, n1, n2, heads, size, size, channels // heads)
        x = x.permute(0, 4, 1, 5, 2, 3, 6) if distant else x.permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, n1 * size, n2 * size, channels)


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (97, 64), (33, 250), (64, 64), (40, 200)])
@torch.no_grad()
def test_windows_of_rank_4_are_bit_equal_to_rank_7(size, dynamic, monkeypatch):
    model = deployed(window_size=3)
    x = torch.randn(2, 3, *size)
    ours = OnnxEMOv2(model, dynamic)(x)
    monkeypatch.setattr(onnx_network, 'WindowAttention', Rank7)
    theirs = OnnxEMOv2(model, dynamic)(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('window', [1, 3, 8])
@torch.no_grad()
def test_layout_is_the_same_function(window, dynamic):
    """In double precision, so that nothing hides behind rounding; sizes with and without padding."""
    model = visible(EMOv2(TINY, window_size=window, final_norm=True)).double().eval()
    folded = deepcopy(model)
    folded.switch_to_deploy()
    exported = OnnxEMOv2(folded, dynamic)
    for size in ((1, 1), (7, 64), (33, 70), (96, 96), (200, 96)):
        x = torch.randn(2, 3, *size, dtype=torch.double)
        for ours, theirs in zip(exported(x), model(x)):
            assert relative(ours, theirs) < 1e-11


def graph_of(model, x, axes):
    folded = deepcopy(model)
    folded.switch_to_deploy()
    names = [f'y{i}' for i in range(len(model.out_indices))]
    return trace(OnnxEMOv2(folded, len(axes) > 1), x, names, {'image': axes})


def session_of(graph):
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('window', [3, 8])
@torch.no_grad()
def test_any_size_of_a_dynamic_graph(window):
    model = visible(EMOv2(TINY, window_size=window)).eval()
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    session = session_of(graph_of(model, torch.randn(2, 3, 64, 96), axes))
    for size in ((1, 3, 1, 1), (3, 3, 7, 64), (1, 3, 33, 70), (2, 3, 96, 96), (1, 3, 200, 300)):
        x = torch.randn(size)
        for ours, theirs in zip(session.run(None, {'image': x.numpy()}), model(x)):
            assert ours.shape == theirs.shape
            assert relative(torch.from_numpy(ours), theirs) < 1e-5


def test_graph_of_one_size_is_lean():
    """Shapes are constants, nothing is padded, one window is computed once, no rank is above 4."""
    model = visible(EMOv2(TINY, window_size=4)).eval()
    graph = graph_of(model, torch.randn(2, 3, 128, 128), {0: 'batch'})
    count = Counter(node.op_type for node in graph.graph.node)
    assert not {'Shape', 'Gather', 'Pad', 'Slice', 'Concat'} & set(count)
    assert count['Softmax'] == 2 + 1  # at 8 x 8 and 4 x 4 tokens
    inferred = onnx.shape_inference.infer_shapes(graph)
    ranks = [len(value.type.tensor_type.shape.dim) for value in inferred.graph.value_info]
    assert len(ranks) > 100
    assert max(ranks) == 4


@pytest.mark.parametrize('bins', [1, 2, 3, 6, (2, 3)])
def test_pooling(bins):
    pooling = replace(nn.Sequential(nn.AdaptiveAvgPool2d(bins)), None, dynamic=True)
    assert type(pooling[0]) is not nn.AdaptiveAvgPool2d or bins == 1
    for size in ((7, 7), (16, 13), (5, 2), (1, 1)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(pooling(x), nn.AdaptiveAvgPool2d(bins)(x))


@pytest.mark.parametrize('name', ['onnx', 'onnxruntime'])
def test_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, name, None)
    with pytest.raises(ImportError, match=f'{name}.*pip install onnx onnxruntime'):
        onnx_network.import_onnx(name)
