"""ONNX graphs with fewer bits: int8, calibrated on images, and weights in half precision."""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Collection, Iterator, Sequence

import numpy as np
import torch

from ..errors import UserError
from .onnx_network import import_onnx

IMAGES = 256  # at most, for calibration
PROBED = 2  # images on which layers are tried one by one
LARGEST_ERROR = 0.05  # relative, of the head's maps: layers that alone cause more stay in float
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
LAYERS = ('Conv', 'Gemm', 'MatMul')
BETWEEN = (
    'Add',
    'Mul',
    'Sigmoid',
)  # in int8, too, between two layers: else each layer converts back and forth
PARTS = ('backbone', 'neck', 'head', 'bbox_head', 'rpn_head', 'mask_head', 'decode_head')
SMALL = 256  # elements of a weight that half precision leaves alone


def find_images(folder: Path) -> list[Path]:
    """Choose images spread evenly over all in a folder and the folders in it.

    Raises:
        UserError: If there are none.
    """
    paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f'--quantize is {folder}: no images there ({" ".join(SUFFIXES)})')
    return paths[:: -(-len(paths) // IMAGES)]


def part_of(name: str) -> str | None:
    """The part of the model that a node belongs to, such as ``backbone/stages.2.1``; None outside of it."""
    scopes = name.strip('/').split('/')[:-1]
    for i, scope in enumerate(scopes):
        if scope in PARTS:
            return '/'.join(scopes[i : i + 2])
    return None


def find_targets(graph: Any) -> list[Any]:
    """Nodes of a model that are computed in int8.

    These are the layers with weights, and sums, products and sigmoids between two of them. The products of
    the attention stay in fp32, which is as fast and nearer to the graph that was given; so does what follows
    the heads, where coordinates of boxes need their precision.
    """
    weights = {weight.name for weight in graph.initializer}
    layers = {
        node.name
        for node in graph.node
        if node.op_type in LAYERS and weights & set(node.input) and part_of(node.name)
    }

    def reached(nodes: Sequence[Any], sources: str, targets: str) -> set[str]:
        """Names of the nodes that layers lead to, in the order given."""
        tensors: set[str] = set()
        found = set()
        for node in nodes:
            if tensors & set(getattr(node, sources)):
                found.add(node.name)
            if node.name in found or node.name in layers:
                tensors.update(getattr(node, targets))
        return found

    nodes = list(graph.node)
    inside = reached(nodes, 'input', 'output') & reached(nodes[::-1], 'output', 'input')
    return [
        node
        for node in nodes
        if node.name in layers or (node.op_type in BETWEEN and node.name in inside and part_of(node.name))
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to do what is done here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _quantize(source: Path, target: Path, inputs: Sequence[np.ndarray], names: Collection[str]) -> None:
    """Write a graph with the nodes of ``names`` in int8, a scale for each output channel of the weights."""
    tools = import_onnx('onnxruntime.quantization')

    class Reader(tools.CalibrationDataReader):  # type: ignore[name-defined]  # imported by name
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.left, None)
            return None if x is None else {'image': x}

    tools.quantize_static(
        str(source),
        str(target),
        Reader(),
        activation_type=tools.QuantType.QUInt8,  # with QInt8 onnxruntime falls back to fp32 on x86
        per_channel=True,
        op_types_to_quantize=[*LAYERS, *BETWEEN],
        nodes_to_quantize=sorted(names),
    )


def _outputs(path: Path, names: Sequence[str], inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Tensors of a graph for some inputs, all in one row."""
    runtime = import_onnx('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return np.concatenate([y.ravel() for x in inputs for y in session.run(list(names), {'image': x})])


def _add_outputs(model: Any) -> list[str]:
    """Make the tensors that leave the backbone, neck and heads outputs of a graph; returns their names."""
    onnx = import_onnx('onnx')
    outer = {name for node in model.graph.node if not part_of(node.name) for name in node.input}
    known = {output.name for output in model.graph.output}
    found = []
    for node in model.graph.node:
        if part_of(node.name):
            found += [name for name in node.output if name in outer or name in known]
    if not found:  # a backbone alone
        return sorted(known)
    for name in found:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return found


def measure_parts(path: Path, targets: Sequence[Any], inputs: Sequence[np.ndarray]) -> dict[str, float]:
    """Relative error of the head's maps when one part of the model alone is in int8, by part."""
    onnx = import_onnx('onnx')
    model = onnx.load(str(path))
    names = _add_outputs(model)
    probe, small = path.with_name('probe.onnx'), path.with_name('probe_int8.onnx')
    onnx.save(model, str(probe))
    expected = _outputs(probe, names, inputs)
    parts: dict[str, list[str]] = {}
    for node in targets:
        parts.setdefault(part_of(node.name) or '', []).append(node.name)
    errors = {}
    for part, nodes in parts.items():
        _quantize(probe, small, inputs, nodes)
        difference = np.linalg.norm(_outputs(small, names, inputs) - expected)
        errors[part] = float(difference / np.linalg.norm(expected))
    return errors


def quantize(graph: Any, inputs: Sequence[np.ndarray]) -> tuple[Any, list[str]]:
    """Make an int8 graph, with the ranges of activations that inputs cause.

    Each part of the model (a block, a layer of the neck or of a head) is first put into int8 alone: one that
    causes an error above :data:`LARGEST_ERROR` stays in float.

    Args:
        graph: In fp32.
        inputs: Of a batch of one, for calibration.

    Returns:
        The int8 graph and the names of the parts that stay in float.
    """
    onnx = import_onnx('onnx')
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, small = (Path(folder, f'{name}.onnx') for name in ('fp32', 'prepared', 'int8'))
        onnx.save(graph, str(given))
        tools = import_onnx('onnxruntime.quantization.shape_inference')
        tools.quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
        targets = find_targets(onnx.load(str(prepared)).graph)
        if not targets:
            raise UserError('no layer of this model can be computed in int8')
        errors = measure_parts(prepared, targets, inputs[:: max(1, len(inputs) // PROBED)][:PROBED])
        kept = [part for part, error in errors.items() if error > LARGEST_ERROR]
        names = [node.name for node in targets if part_of(node.name) not in kept]
        if not names:
            raise UserError(f'int8 changes the result of every part by more than {LARGEST_ERROR:.0%}')
        _quantize(prepared, small, inputs, names)
        result = onnx.load(str(small))
    del result.metadata_props[:]
    return result, [f'{part} ({errors[part]:.1%} alone)' for part in kept]


def to_half(graph: Any) -> Any:
    """Store the weights of a graph in half precision; it computes in fp32, and takes and gives the same.

    Runtimes turn the weights back when they load the file, so that it is half as large and as fast as before.

    Raises:
        UserError: If a weight is too large for half precision.
    """
    onnx = import_onnx('onnx')
    numpy_helper, casts = onnx.numpy_helper, []
    for weight in graph.graph.initializer:
        if (
            weight.data_type != onnx.TensorProto.FLOAT
            or np.prod(weight.dims) < SMALL
            or not _is_weight(graph, weight)
        ):
            continue
        values = numpy_helper.to_array(weight)
        half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f'--half: {weight.name} has values up to {abs(values).max():.3g}, too large for fp16'
            )
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f'{name}_fp16'))
        casts.append(
            onnx.helper.make_node('Cast', [f'{name}_fp16'], [name], f'{name}_fp32', to=onnx.TensorProto.FLOAT)
        )
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)
    onnx.checker.check_model(graph)
    return graph


def _is_weight(graph: Any, tensor: Any) -> bool:
    """Whether a tensor is a weight of a layer, and not anchors or the like."""
    return any(
        tensor.name in node.input and node.op_type in (*LAYERS, 'ConvTranspose') for node in graph.graph.node
    )
