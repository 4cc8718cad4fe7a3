"""Convert a traced network to LiteRT or ExecuTorch, or run such a file, in an environment of its own.

    PYTHON -I worker.py convert JOB
    PYTHON -I worker.py run predict.py

The converters want a newer torch than the libraries of OpenMMLab do. So this file needs neither them nor
this package: it reads a TorchScript file, which newer versions understand. It is started by
:mod:`emo2_mm.export.environment`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import warnings
from functools import partial
from importlib import import_module
from operator import getitem
from pathlib import Path
from typing import IO, Any, Callable, Sequence

import numpy as np

RECIPE_FP16 = [  # weights of layers are cast when the model is loaded
    {
        'regex': '.*',
        'operation': operation,
        'algorithm_key': 'float_casting',
        'op_config': {
            'weight_tensor_config': {'num_bits': 16, 'dtype': 'FLOAT'},
            'compute_precision': 'FLOAT',
            'explicit_dequantize': True,
        },
    }
    for operation in ('CONV_2D', 'DEPTHWISE_CONV_2D', 'FULLY_CONNECTED')
]


def send(stream: IO[bytes], content: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write a message: a line of JSON, and arrays, whose bytes it counts."""
    parts = []
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        parts.append(file.getvalue())
    stream.write(json.dumps({**content, 'arrays': [len(part) for part in parts]}).encode() + b'\n')
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Read a message that :func:`send` wrote; ``EOFError`` if the other side has ended."""
    line = stream.readline()
    if not line:
        raise EOFError
    content = json.loads(line)
    parts = [io.BytesIO(stream.read(count)) for count in content.pop('arrays')]
    return content, [np.load(part, allow_pickle=False) for part in parts]


def usual_form(name: str, overload: str, arguments: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """An operation of TorchScript and its arguments as converters know it."""
    aten = import_module('torch').ops.aten
    if name == '_convolution':  # it has further arguments, about CUDA
        return aten.convolution.default, arguments[:9]
    if name.startswith('upsample_') and not overload:
        x, size, *corners, high, wide = arguments
        scales = None if high is None else [high, wide]
        return getattr(aten, name).vec, [x, None if scales else size, *corners, scales]
    return getattr(getattr(aten, name), overload or 'default'), arguments


def read_network(path: str, image: Any, outputs: list[str]) -> Any:
    """A traced, frozen network as a ``torch.fx.GraphModule``, for ``torch.export`` takes no TorchScript.

    Every operation is computed for an example. What does not depend on the pixels becomes a constant, such as
    the sizes of maps: the network takes images of one size.

    Args:
        path: TorchScript file.
        image: The example.
        outputs: Names of the tensors that it gives; the new network gives a dict of them.

    Raises:
        ValueError: If it has an operation that is not one of torch's own.
    """
    torch = import_module('torch')
    script = torch.jit.load(path, map_location='cpu').inlined_graph
    module, graph = torch.nn.Module(), torch.fx.Graph()
    start = list(script.inputs())[-1].debugName()
    values: dict[str, Any] = {start: image}  # what was computed for the example
    nodes: dict[str, Any] = {start: graph.placeholder('image')}  # of what depends on the pixels

    def argument(name: str) -> Any:
        if name in nodes or not isinstance(values[name], torch.Tensor):
            return nodes.get(name, values[name])
        constant = f'constant_{len(module._buffers)}'
        # ExecuTorch writes the storage from its start, whatever part of it the tensor is.
        value = values[name].detach().clone(memory_format=torch.contiguous_format)
        module.register_buffer(constant, value)
        nodes[name] = graph.get_attr(constant)
        return nodes[name]

    for step in script.nodes():
        ins, outs = [v.debugName() for v in step.inputs()], [v.debugName() for v in step.outputs()]
        kind, given = step.kind(), [values[v.debugName()] for v in step.inputs()]
        if kind == 'prim::Constant':
            values[outs[0]] = step.output().toIValue()
        elif kind in ('prim::ListConstruct', 'prim::TupleConstruct'):
            values[outs[0]] = given
            if any(name in nodes for name in ins):
                nodes[outs[0]] = [argument(name) for name in ins]
        elif kind in ('prim::ListUnpack', 'prim::TupleUnpack'):
            values.update(zip(outs, given[0]))
            if ins[0] in nodes:
                source = nodes[ins[0]]
                items = [(source, i) for i in range(len(outs))]
                nodes.update(zip(outs, (graph.call_function(getitem, item) for item in items)))
        elif kind == 'prim::NumToTensor':
            values[outs[0]] = torch.tensor(given[0])
        elif kind in ('aten::Int', 'aten::Float'):
            values[outs[0]] = {'aten::Int': int, 'aten::Float': float}[kind](given[0])
        elif kind.startswith('aten::'):
            schema = torch._C.parse_schema(step.schema())
            count = sum(not each.kwarg_only for each in schema.arguments)
            keys = [each.name for each in schema.arguments[count:]]
            function, arguments = usual_form(kind[len('aten::') :], schema.overload_name, given[:count])
            found = function(*arguments, **dict(zip(keys, given[count:])))
            values[outs[0]] = found
            if isinstance(found, (torch.Tensor, list, tuple)) and any(name in nodes for name in ins):
                given = list(map(argument, ins))
                _, arguments = usual_form(kind[len('aten::') :], schema.overload_name, given[:count])
                named = dict(zip(keys, given[count:]))
                nodes[outs[0]] = graph.call_function(function, tuple(arguments), named)
        else:
            raise ValueError(f'{kind}: an operation of TorchScript that is not known here')
    found = nodes[next(iter(script.outputs())).debugName()]
    graph.output(dict(zip(outputs, found)))
    return torch.fx.GraphModule(module, graph).eval()


def to_litert(network: Callable[[], Any], image: Any, job: dict[str, Any]) -> bytes:
    """A network as a flatbuffer of LiteRT, with the metadata inside.

    In fp16 only weights are smaller. In int8 the runtime also rounds what goes into a layer, by its range.
    """
    exact = Path(f'{job["network"]}.tflite')  # kept for the other precisions
    if not exact.exists():
        import_module('litert_torch').convert(network(), sample_kwargs={'image': image}).export(str(exact))
    tools = import_module('ai_edge_litert.tools.flatbuffer_utils')
    schema = import_module('ai_edge_litert.schema_py_generated')
    model = tools.convert_bytearray_to_object(exact.read_bytes())
    for key, value in job['metadata'].items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(value.encode(), np.uint8)
        entry.name, entry.buffer = key, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), entry]
    content = bytes(tools.convert_object_to_bytearray(model))
    if job['precision'] == 'fp32':
        return content
    recipes = import_module('ai_edge_quantizer.recipe')
    recipe = RECIPE_FP16 if job['precision'] == 'fp16' else recipes.dynamic_wi8_afp32()
    quantizer = import_module('ai_edge_quantizer.quantizer').Quantizer(content, recipe)
    return bytes(quantizer.quantize(enable_progress_report=False).quantized_model)


def to_executorch(network: Callable[[], Any], image: Any, job: dict[str, Any]) -> bytes:
    """A network as a program of ExecuTorch; XNNPACK computes what it can."""
    exir = import_module('executorch.exir')
    xnnpack = import_module('executorch.backends.xnnpack.partition.xnnpack_partitioner')
    program = import_module('torch').export.export(network(), (image,), strict=False)
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    return lowered.to_executorch().buffer


CONVERTERS: dict[str, Callable[..., bytes]] = {
    'litert': to_litert,
    'executorch': to_executorch,
}


def convert(job: dict[str, Any]) -> None:
    """Write a model.

    Args:
        job: ``format``, ``network`` (TorchScript file), ``shape`` and ``dtype`` of its input, names of the
            ``outputs``, ``precision``, ``metadata`` (texts) and ``file`` to write.
    """
    warnings.simplefilter('ignore')
    torch = import_module('torch')
    torch.set_num_threads(job['threads'])
    image = torch.zeros(job['shape'], dtype=getattr(torch, job['dtype']))
    with torch.no_grad():
        network = partial(read_network, job['network'], image, job['outputs'])
        content = CONVERTERS[job['format']](network, image, job)
    Path(job['file']).write_bytes(content)


def run(program: str) -> None:
    """Run models for another process, which asks on stdin and gets answers on stdout.

    The first message has the arguments of a runtime of predict.py: ``runtime``, ``folder``, ``entry`` and
    ``threads``. Each further one has an image and the ``names`` of the outputs that are wanted. One without
    an image repeats the last and gets no arrays: it is for timing.
    """
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what libraries print is no answer
    spec: Any = importlib.util.spec_from_file_location('predict', program)
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    runtime: Any = None
    images: list[np.ndarray] = []
    while True:
        try:
            content, arrays = receive(stdin)
        except EOFError:
            return
        try:
            if runtime is None:
                kind = predict.RUNTIMES[content['runtime']]
                runtime = kind(Path(content['folder']), content['entry'], content['threads'])
                found = []
            else:
                images = arrays or images
                found = runtime(images[0], content['names'])
        except Exception as error:  # whatever it is, the other process has to hear of it
            send(stdout, {'error': f'{type(error).__name__}: {error}'})
        else:
            send(stdout, {}, found if arrays else [])


if __name__ == '__main__':
    if sys.argv[1] == 'convert':
        convert(json.loads(sys.argv[2]))
    else:
        run(sys.argv[2])
