"""ncnn, MNN and Core ML: what their converters do beyond what every format does."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from emo2_mm.errors import UserError
from emo2_mm.export import predict
from emo2_mm.export.end_to_end import Unsupported
from emo2_mm.export.formats import FORMATS, Source, coreml, mil, mnn, ncnn

META = dict(color_order='BGR', config='a.py')


def needs(name):
    missing = FORMATS[name].missing()
    return pytest.mark.skipif(bool(missing), reason=f'needs {", ".join(missing)}')


EACH = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=needs(name)) for name in ('ncnn', 'mnn', 'coreml')]
)


class Network(nn.Module):
    """Of pixels (N, H, W, 3); every operation that a format must keep exact."""

    def __init__(self, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 48, 3, 2, 1), nn.LayerNorm(48), nn.Linear(48, 64)
        self.last = last or nn.Identity()

    def forward(self, x):
        y = self.norm(self.conv(x.permute(0, 3, 1, 2).float() / 255).permute(0, 2, 3, 1))
        return (self.last(torch.nn.functional.gelu(4 * self.linear(y)).permute(0, 3, 1, 2)),)


def source_of(folder, network, batch=1, names=('logits',)):
    generator = torch.Generator().manual_seed(1)
    example = torch.randint(0, 256, (batch, 16, 24, 3), dtype=torch.uint8, generator=generator)
    (folder / 'work').mkdir()
    return Source(network.eval(), example, list(names), {}, META, folder / 'work')


def entry_of(source, files, precision='fp32'):
    with torch.no_grad():
        outputs = dict(zip(source.outputs, source.network(source.example)))
    return dict(
        files=files,
        precision=precision,
        input=dict(name='image', dtype='uint8', shape=list(source.example.shape)),
        outputs=[
            dict(name=name, shape=list(y.shape), dtype=str(y.dtype).split('.')[-1])
            for name, y in outputs.items()
        ],
        **source.notes,
    )


def error_of(runtime, source):
    """Relative error of the first output."""
    with torch.no_grad():
        expected = source.network(source.example)[0].numpy()
    (found,) = runtime(source.example.numpy(), source.outputs)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ('name', 'precision'),
    [
        pytest.param(name, precision, marks=needs(name))
        for name in ('ncnn', 'mnn', 'coreml')
        for precision in FORMATS[name].precisions
        if precision != 'int8'
    ],
)
def test_a_network_is_exact_in_fp32_and_nearly_so_in_fp16(name, precision, tmp_path):
    """GELU is not the approximation by tanh, and ncnn does not compute in fp16 unless it is asked to."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(64, 64))
    source = source_of(tmp_path, Network(head))
    files = FORMATS[name].convert(source, tmp_path, precision)
    assert all((tmp_path / file).exists() for file in files)
    runtime = coreml.Simulation if name == 'coreml' else lambda *args: predict.RUNTIMES[name](*args, 1)
    error = error_of(runtime(tmp_path, entry_of(source, files, precision)), source)
    assert error < 1e-6 if precision == 'fp32' else 1e-5 < error < 1e-3


def test_the_packages_of_a_format_are_named(monkeypatch):
    for name, command in (
        ('ncnn', 'pip install onnx ncnn pnnx'),
        ('mnn', 'pip install onnx MNN'),
        ('coreml', 'pip install coremltools'),
    ):
        form = replace(FORMATS[name], modules=('no_such_module',))
        with pytest.raises(UserError, match=f'--format {name} needs no_such_module, not installed') as error:
            form.require()
        assert str(error.value).endswith(f'run\n  {command}')


@EACH
def test_a_batch_that_a_format_cannot_take(name, tmp_path):
    source = source_of(tmp_path, Network(), batch=2, names=['dets'])
    with pytest.raises(Unsupported, match='takes one image at a time; leave out --batch'):
        FORMATS[name].convert(source, tmp_path, 'fp32')


# ---------------------------------------------------------------------------------------------- ncnn


class ArgMax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


@needs('ncnn')
def test_what_ncnn_does_not_know_is_named(tmp_path):
    """pnnx writes it nevertheless, and ends with 0."""
    source = source_of(tmp_path, Network(ArgMax()), names=['map'])
    with pytest.raises(Unsupported, match='ncnn has no layer for ArgMax'):
        ncnn.write_ncnn(source, tmp_path, 'fp32')
    (tmp_path / 'a.param').write_text('7767517\n1 1\nArgMax a 0 1 a\n')
    (tmp_path / 'a.bin').touch()
    entry = dict(files=['a.param', 'a.bin'], outputs=[], precision='fp32', x86_packing=True)
    with pytest.raises(RuntimeError, match='ncnn cannot load it'):
        predict.Ncnn(tmp_path, entry, 1)


@needs('ncnn')
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the crash is one on x86')
def test_a_model_that_crashes_without_packing_gets_it(tmp_path):
    source = source_of(tmp_path, Network(nn.Conv2d(64, 16, 3, 1, 12, 12)))
    files = ncnn.write_ncnn(source, tmp_path, 'fp32')
    assert source.notes == dict(x86_packing=True)
    assert error_of(predict.Ncnn(tmp_path, entry_of(source, files), 1), source) < 1e-6


@needs('ncnn')
def test_a_model_that_always_crashes_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ncnn, 'TRY', 'import os; os.abort()')
    with pytest.raises(Unsupported, match='ncnn ends with -6 when it runs the model'):
        ncnn.write_ncnn(source_of(tmp_path, Network()), tmp_path, 'fp32')


# ---------------------------------------------------------------------------------------------- MNN


@needs('mnn')
def test_the_converter_of_mnn_installs_nothing(tmp_path, monkeypatch):
    """The command of the package starts the first pip that it finds, and sends usage data."""
    pip = tmp_path / 'bin/pip'
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\ntouch {tmp_path}/asked\n')
    pip.chmod(0o755)
    monkeypatch.setenv('PATH', f'{pip.parent}{os.pathsep}{os.environ["PATH"]}')
    source = source_of(tmp_path, Network())
    for precision in ('fp32', 'int8'):
        mnn.write_mnn(source, tmp_path, precision)
    assert not (tmp_path / 'asked').exists()
    assert (tmp_path / 'model.mnn').stat().st_size > (tmp_path / 'model-int8.mnn').stat().st_size


@needs('mnn')
def test_int8_of_mnn_is_said_to_be_of_weights_alone(tmp_path):
    source = source_of(tmp_path, Network())
    files = mnn.write_mnn(source, tmp_path, 'int8')
    assert 'int8 holds the weights alone; it computes in fp32' in source.notes['limits']
    assert 1e-3 < error_of(predict.MNN(tmp_path, entry_of(source, files), 1), source) < 0.05


@needs('mnn')
def test_an_error_of_the_converter_of_mnn_is_shown(tmp_path):
    source = source_of(tmp_path, Network())
    source.onnx_file().write_bytes(b'damaged')
    with pytest.raises(RuntimeError, match='the converter ends with'):
        mnn.write_mnn(source, tmp_path, 'fp32')


# ---------------------------------------------------------------------------------------------- Core ML


@needs('coreml')
def test_a_core_ml_model_takes_an_image(tmp_path):
    source = source_of(tmp_path, Network())
    files = coreml.write_coreml(source, tmp_path, 'fp32')
    spec = mil.Program(tmp_path / files[0]).spec
    image = spec.description.input[0].type.imageType
    assert (image.height, image.width) == (16, 24)
    assert dict(spec.description.metadata.userDefined)['config'] == 'a.py'
    entry = entry_of(source, files)
    assert entry['color_layout'] == 'BGR'
    entry['color_layout'] = 'RGB'
    with pytest.raises(UserError, match='or of other colors'):
        coreml.Simulation(tmp_path, entry)
    with pytest.raises(OSError, match='Core ML runs on macOS and iOS alone'):
        predict.CoreML(tmp_path, entry, 1)


class Boxes(nn.Module):
    """Coordinates up to 1000, as decoding gives them."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)[..., :4].sigmoid() * 1000.3


@needs('coreml')
def test_core_ml_computes_boxes_in_float32(tmp_path):
    """In half precision they would be half a pixel away."""
    source = source_of(tmp_path, Network(Boxes()), names=['boxes'])
    files = coreml.write_coreml(source, tmp_path, 'fp16')
    (found,) = coreml.Simulation(tmp_path, entry_of(source, files))(source.example.numpy(), ['boxes'])
    assert (found != found.astype(np.float16)).mean() > 0.9
    assert 0 < error_of(coreml.Simulation(tmp_path, entry_of(source, files)), source) < 1e-3


@needs('coreml')
def test_int8_of_core_ml(tmp_path):
    source = source_of(tmp_path, Network(nn.Conv2d(64, 64, 1)))
    files = coreml.write_coreml(source, tmp_path, 'int8')
    assert 1e-4 < error_of(coreml.Simulation(tmp_path, entry_of(source, files)), source) < 0.05
    assert 'int8 holds the weights alone; it computes in fp32' in source.notes['limits']


@needs('coreml')
def test_the_interpreter_says_what_it_does_not_know(tmp_path, monkeypatch):
    source = source_of(tmp_path, Network())
    files = coreml.write_coreml(source, tmp_path, 'fp32')
    with monkeypatch.context() as patch:
        patch.delitem(mil.OPERATIONS, 'gelu')
        with pytest.raises(UserError, match='Core ML: gelu cannot be checked here'):
            mil.Program(tmp_path / files[0])
    monkeypatch.setattr(mil, 'MOST_AXES', 3)
    with pytest.raises(UserError, match='a tensor has 4 axes, more than 3'):
        mil.Program(tmp_path / files[0])
