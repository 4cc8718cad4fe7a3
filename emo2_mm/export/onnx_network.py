"""EMOv2 as it is exported: in the layout that ONNX Runtime computes fastest, with tensors of rank 4 at most.

The maps between blocks are (B, C, H, W), and the 1x1 layers next to depth-wise convolutions are
convolutions: the runtime keeps all of them in a blocked layout of its own. Layer norm, GELU and the linear
layers in front of it see (B, H, W, C); the permutations in between become part of the runtime's reordering.
Windows are gathered by swapping two axes at a time, for several runtimes take no tensor of a higher rank. In
a graph of one size the shapes are constants, and what needs no padding has none.
"""

from __future__ import annotations

import inspect
import io
import warnings
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import SEWMHSA
from ..emov2 import I2RMB, EMOv2

OPSET = 17  # the newest that torch 2.1 writes; it has LayerNormalization


def is_one(count: int) -> bool:
    """Whether a number of windows is 1, and not a traced number that stands for any."""
    return isinstance(count, int) and count == 1


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """The 1x1 convolution that computes what a linear layer does."""
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight.data, conv.bias = layer.weight.data[:, :, None, None], layer.bias
    return conv


class WindowAttention(nn.Module):
    """:class:`emo2_mm.attention.SEWMHSA`, one kind of windows after the other, each operation on its own."""

    def __init__(self, attention: SEWMHSA) -> None:
        super().__init__()
        self.heads, self.size = attention.heads, attention.window_size
        weights, biases = attention.qk.weight.data.chunk(2), attention.qk.bias.data.chunk(2)
        scale = (len(biases[0]) // self.heads) ** -0.5
        self.q, self.k = linear(weights[0] * scale, biases[0] * scale), linear(weights[1], biases[1])
        self.v = attention.v

    def split(self, x: Tensor, channels: int, n1: int, n2: int, distant: bool) -> Tensor:
        """Gather windows (B * n1 * n2, heads, size**2, d) of a map (B, n1 * size, n2 * size, channels).

        Axes are swapped one pair at a time, so that no tensor has more than four.
        """
        size, heads = self.size, self.heads
        if distant:
            if not is_one(n1):
                x = x.reshape(-1, size, n1, size * n2 * channels).transpose(1, 2)
            if not is_one(n2):
                x = x.reshape(-1, size * size, n2, channels).transpose(1, 2)
        elif not is_one(n2):
            x = x.reshape(-1, size, n2, size * channels).transpose(1, 2)
        return x.reshape(-1, size * size, heads, channels // heads).transpose(1, 2)

    def merge(self, x: Tensor, n1: int, n2: int, distant: bool) -> Tensor:
        """Put the windows of v back into a map (B, n1 * size, n2 * size, channels), as in :meth:`split`."""
        size, channels = self.size, self.v.out_features
        x = x.transpose(1, 2)
        if distant:
            if not is_one(n2):
                x = x.reshape(-1, n2, size * size, channels).transpose(1, 2)
            if not is_one(n1):
                x = x.reshape(-1, n1, size, size * n2 * channels).transpose(1, 2)
        elif not is_one(n2):
            x = x.reshape(-1, n2, size, size * channels).transpose(1, 2)
        return x.reshape(-1, n1 * size, n2 * size, channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """Map (B, h, w, channels) to (B, h, w, expanded_channels). Traced numbers stand for any size."""
        size, fixed = self.size, isinstance(h, int)
        n1, n2 = (h + size - 1) // size, (w + size - 1) // size
        padded = not fixed or h % size or w % size
        if padded:
            x = F.pad(x, (0, 0, 0, n2 * size - w, 0, n1 * size - h))
        q, k, v = self.q(x), self.k(x), F.gelu(self.v(x))

        def attend(distant: bool) -> Tensor:
            queries = self.split(q, self.q.out_features, n1, n2, distant)
            keys = self.split(k, self.k.out_features, n1, n2, distant)
            values = self.split(v, self.v.out_features, n1, n2, distant)
            attention = (queries @ keys.transpose(-2, -1)).softmax(-1)
            return self.merge(attention @ values, n1, n2, distant)

        one = is_one(n1) and is_one(n2)  # then both kinds of windows are the whole map
        y = 2 * attend(False) if one else attend(False) + attend(True)
        return y[:, :h, :w] if padded else y


class Block(nn.Module):
    """:class:`emo2_mm.emov2.I2RMB`, deployed."""

    def __init__(self, block: I2RMB) -> None:
        super().__init__()
        self.attends = isinstance(block.expand, SEWMHSA)
        self.norm = block.norm if isinstance(block.norm, nn.LayerNorm) else None
        expand: Any = block.expand
        self.expand: nn.Module
        if self.attends:
            self.expand = WindowAttention(expand)
        else:
            self.expand = pointwise(expand.linear) if self.norm is None else expand.linear
        self.depthwise = block.depthwise
        self.project = pointwise(block.project)
        self.residual = block.residual

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """Map (B, C, h, w) to (B, C', ceil(h / stride), ceil(w / stride))."""
        if self.norm is None:
            y = F.silu(self.expand(x))
        else:
            y = self.norm(x.permute(0, 2, 3, 1))
            y = self.expand(y, h, w) if self.attends else F.gelu(self.expand(y))
            y = y.permute(0, 3, 1, 2)
        local = F.silu(self.depthwise(y))
        y = self.project(local + y if self.residual else local)
        return x + y if self.residual else y


class OnnxEMOv2(nn.Module):
    """A deployed EMOv2, to be traced: the same function of images (B, 3, H, W).

    Args:
        backbone: After ``switch_to_deploy()``; weights are shared where they can be.
        dynamic: Whether the graph must take images of any size, not only of that of the example.
    """

    def __init__(self, backbone: EMOv2, dynamic: bool) -> None:
        super().__init__()
        self.out_indices, self.dynamic = backbone.out_indices, dynamic
        self.stem = backbone.stem
        self.stages: Any = nn.ModuleList(nn.ModuleList(map(Block, stage)) for stage in backbone.stages)
        self.norm: Any = backbone.norm
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.silu(self.stem.conv(x))
        x = F.silu(self.stem.depthwise(x))
        outs = []
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage):
                if j < 2:  # the first block halves the map
                    h, w = x.shape[2:] if self.dynamic else map(int, x.shape[2:])
                x = block(x, h, w)
            if i in self.out_indices:
                last = self.norm is not None and i == len(self.stages) - 1
                outs.append(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else x)
        return tuple(outs)


class AdaptiveAvgPool2d(nn.Module):
    """:class:`torch.nn.AdaptiveAvgPool2d` as two matrix products, for ONNX has no such pooling."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size

    @staticmethod
    def weights(length: int, bins: int) -> Tensor:
        """What each of ``length`` numbers contributes to each of ``bins`` means: (bins, length)."""
        places, i = torch.arange(length), torch.arange(bins)[:, None]
        first, last = i * length // bins, ((i + 1) * length + bins - 1) // bins
        inside = ((places >= first) & (places < last)).float()
        return inside / inside.sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        return self.weights(h, self.size[0]) @ x @ self.weights(w, self.size[1]).t()


class Upsample(nn.Module):
    """MMSegmentation's of the same name, which turns the size of the map into a constant when traced."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = (
            upsample.scale_factor,
            upsample.mode,
            upsample.align_corners,
        )

    def forward(self, x: Tensor) -> Tensor:
        size = [n * int(self.factor) for n in x.shape[2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def replace(module: nn.Module, scope: str | None, dynamic: bool) -> nn.Module:
    """Put what can be exported in the place of a deployed backbone and of layers in the heads."""
    if isinstance(module, EMOv2):
        return OnnxEMOv2(module, dynamic)
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
        size: Any = module.output_size  # torch allows None; the three libraries pass numbers
        return AdaptiveAvgPool2d(size)
    if scope == 'mmseg' and isinstance(module, import_module('mmseg.models.utils').Upsample):
        return Upsample(module)
    for name, child in module.named_children():
        setattr(module, name, replace(child, scope, dynamic))
    return module


def import_onnx(name: str) -> Any:
    """Import onnx, onnxruntime or a part of one.

    Raises:
        ImportError: If it is missing; the message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'{error}; run `pip install onnx onnxruntime`') from error


@torch.no_grad()
def trace(
    network: nn.Module,
    x: Tensor,
    names: list[str],
    axes: dict[str, dict[int, str]],
    opset: int | None = None,
) -> Any:
    """Record what a network computes as an ONNX graph, and check the graph.

    Args:
        network: In eval mode; gives a tensor or a tuple.
        x: Images, the input ``image`` of the graph.
        names: Of the outputs.
        axes: The axes of ``image`` and outputs that may have any length, and what they are called.
        opset: Defaults to ``OPSET``.
    """
    onnx = import_onnx('onnx')
    # newer torch goes through dynamo unless it is told not to
    export: Any = torch.onnx.export  # the hints of newer torch leave out single tensors and open files
    tracing = dict(dynamo=False) if 'dynamo' in inspect.signature(export).parameters else {}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that sizes become constants is meant
        export(
            network,
            x,
            file,
            input_names=['image'],
            output_names=names,
            dynamic_axes=axes,
            opset_version=opset or OPSET,
            **tracing,
        )
    graph = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(graph, full_check=True)
    return graph


def session(graph: Any) -> Any:
    """Make onnxruntime ready to compute a graph on the CPU, with as many threads as torch takes."""
    onnxruntime = import_onnx('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry('session.force_spinning_stop', '1')  # leave torch its cores
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
