"""tools/export_onnx.py: ONNX Runtime computes what torch does, and the file says what one must know."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import TINY, tiny, visible
from helpers.tiny import CLASSIFIER, DETECTOR, ROOT, SEGMENTOR, SIDE, imported, run, write_config, write_data
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

import emo2_mm
from emo2_mm import EMOv2

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

TEXTS = {'mmdet': DETECTOR, 'mmseg': SEGMENTOR, 'mmpretrain': CLASSIFIER}


@pytest.fixture(scope='module')
def tool():
    with imported('export_onnx') as module:
        yield module


@pytest.fixture
def main(tool, monkeypatch, capsys):
    """Run the tool in this process, with two rounds of timing; returns its exit status, output and errors."""
    own = tool.in_turns
    monkeypatch.setattr(tool, 'in_turns', lambda runs, device: own(runs, device, 2))

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['export_onnx.py', *map(str, args)])
        return (tool.main(), *capsys.readouterr())

    return run


def model_of(cfg):
    """A model of a config with random weights that show, the same each time."""
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmpretrain':
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    return visible(revert_sync_batchnorm(MODELS.build(cfg.model))).eval()


@pytest.fixture
def config(request, tmp_path, monkeypatch):
    """In a folder: the config of a scope (tiny.py, the fixture's value), tiny.pth."""
    pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(write_config(tmp_path, TEXTS[request.param]))
    meta = dict(dataset_meta=dict(classes=('night', 'day')))
    torch.save(dict(state_dict=model_of(cfg).state_dict(), meta=meta), 'tiny.pth')
    return cfg


def scopes(*names):
    return pytest.mark.parametrize('config', names, indirect=True)


def outputs_of(path, x):
    """What the file gives, by name."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {'image': x.numpy()}))))


def assert_close(ours, theirs, limit=1e-5):
    """Relative to what varies in a tensor: a constant is easily right."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= limit * (theirs - theirs.mean()).norm()


@scopes('mmpretrain')
def test_classifier(config, main):
    status, out, _ = main('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'new/a.onnx')
    assert status == 0
    assert out.count('3 x 3 x 64 x 64') == 1  # a batch is compared, too
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        model = model_of(config)
        expected = model.head.fc(model.extract_feat(x)[-1])
    assert_close(outputs_of('new/a.onnx', x)['logits'], expected)


@scopes('mmseg')
def test_segmentor_of_any_size(config, main):
    assert main('tiny.py', 'tiny.pth', '--dynamic')[0] == 0
    model = model_of(config)
    for size in ((1, 3, 64, 64), (2, 3, 75, 33)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = model.encode_decode(x, [dict(img_shape=size[2:])])
        found = outputs_of('tiny.onnx', x)['logits']
        assert found.shape == (size[0], 2, *size[2:])
        assert_close(found, expected)


@scopes('mmdet')
def test_detector_of_any_size(config, main):
    status, out, _ = main('tiny.py', 'tiny.pth', '--dynamic', '--out', 'a.onnx')
    assert status == 0
    assert '2 x 3 x 97 x 64' in out
    model = model_of(config)
    for size in ((1, 3, 64, 96), (3, 3, 50, 31)):
        x = torch.randn(size)
        with torch.no_grad():
            scores, boxes = model(x, mode='tensor')
        found = outputs_of('a.onnx', x)
        assert len(found) == 6
        for i in range(3):
            assert_close(found[f'cls_score_{i}'], scores[i])
            assert_close(found[f'bbox_pred_{i}'], boxes[i])


@pytest.mark.slow
def test_detector_of_two_stages(tool):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(ROOT / 'configs/det/mask-rcnn_emo2_1m.py')
    outputs = tool.Outputs(model_of(cfg), 'mmdet').eval()
    session = tool.session(tool.export(tool.deployed(outputs), (64, 96), dynamic=False))
    names = [output.name for output in session.get_outputs()]
    kinds = ('rpn_cls_score', 'rpn_bbox_pred', 'feature')
    assert names == [f'{kind}_{i}' for kind in kinds for i in range(5)]
    assert max(tool.errors(outputs, session, (2, 3, 64, 96)).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('method', ['fpn', 'pspnet', 'segformer', 'deeplabv3'])
def test_other_segmentors_of_any_size(tool, method):
    pytest.importorskip('mmseg')
    outputs = tool.Outputs(
        model_of(Config.fromfile(ROOT / f'configs/seg/{method}_emo2_1m.py')), 'mmseg'
    ).eval()
    session = tool.session(tool.export(tool.deployed(outputs), (64, 96), dynamic=True))
    for size in ((1, 3, 64, 96), (2, 3, 70, 33)):
        assert tool.errors(outputs, session, size)['logits'] < 1e-5


def test_backbone_alone(main, tmp_path, monkeypatch):
    """Of published weights, without a code base."""
    monkeypatch.chdir(tmp_path)
    backbone = dict(type='emo2_mm.EMOv2', arch=TINY, window_size=3, out_indices=(1, 3))
    (tmp_path / 'a.py').write_text(f'model = dict(backbone={backbone})')
    model = tiny(out_indices=(1, 3)).eval()
    torch.save(model.state_dict(), 'published.pth')
    assert main('a.py', 'published.pth', '--backbone', '--shape', 40, 56)[0] == 0
    x = torch.randn(3, 3, 40, 56)
    found = outputs_of('a_backbone.onnx', x)
    assert list(found) == ['stride_8', 'stride_32']
    with torch.no_grad():
        for ours, theirs in zip(found.values(), model(x)):
            assert_close(ours, theirs)


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('window', [1, 3, 8])
def test_layout_is_the_same_function(tool, window, dynamic):
    """In double precision, so that nothing hides behind rounding; sizes with and without padding."""
    model = visible(EMOv2(TINY, window_size=window, final_norm=True)).double().eval()
    deployed = deepcopy(model)
    deployed.switch_to_deploy()
    exported = tool.OnnxEMOv2(deployed, dynamic)
    for size in ((1, 1), (7, 64), (33, 70), (96, 96), (200, 96)):
        x = torch.randn(2, 3, *size, dtype=torch.double)
        with torch.no_grad():
            for ours, theirs in zip(exported(x), model(x)):
                assert_close(ours, theirs, 1e-11)


def graph_of(tool, model, x, axes):
    deployed = deepcopy(model)
    deployed.switch_to_deploy()
    names = [f'y{i}' for i in range(len(model.out_indices))]
    return tool.trace(tool.OnnxEMOv2(deployed, len(axes) > 1), x, names, {'image': axes})


@pytest.mark.parametrize('window', [3, 8])
def test_any_size_of_a_dynamic_graph(tool, window):
    model = visible(EMOv2(TINY, window_size=window)).eval()
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    session = tool.session(graph_of(tool, model, torch.randn(2, 3, 64, 96), axes))
    for size in ((1, 3, 1, 1), (3, 3, 7, 64), (1, 3, 33, 70), (2, 3, 96, 96), (1, 3, 200, 300)):
        x = torch.randn(size)
        with torch.no_grad():
            for ours, theirs in zip(session.run(None, {'image': x.numpy()}), model(x)):
                ours = torch.from_numpy(ours)
                assert ours.shape == theirs.shape
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_graph_of_one_size_is_lean(tool):
    """Shapes are constants, nothing is padded, one window is computed once."""
    model = visible(EMOv2(TINY, window_size=4)).eval()  # two blocks attend, at 8 x 8 and 4 x 4 tokens
    graph = graph_of(tool, model, torch.randn(2, 3, 128, 128), {0: 'batch'})
    count = Counter(node.op_type for node in graph.graph.node)
    assert not {'Shape', 'Gather', 'Pad', 'Slice', 'Concat'} & set(count)
    assert count['Softmax'] == 2 + 1
    # each block that attends: around its norm and convolution 2, for each kind of windows 3 and for k, 1 back
    assert count['Transpose'] == 2 * 2 + 2 * 2 + 3 * 5


@pytest.mark.parametrize('bins', [1, 2, 3, 6, (2, 3)])
def test_pooling(tool, bins):
    pooling = tool.replace(nn.Sequential(nn.AdaptiveAvgPool2d(bins)), None, dynamic=True)
    assert type(pooling[0]) is not nn.AdaptiveAvgPool2d or bins == 1
    for size in ((7, 7), (16, 13), (5, 2), (1, 1)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(pooling(x), nn.AdaptiveAvgPool2d(bins)(x))


@scopes('mmseg')
def test_metadata(config, main):
    main('tiny.py', 'tiny.pth', '--cfg-options', 'model.data_preprocessor.bgr_to_rgb=True')
    model = onnx.load('tiny.onnx')
    facts = {entry.key: entry.value for entry in model.metadata_props}
    versions = json.loads(facts.pop('versions'))
    assert versions['emo2_mm'] == emo2_mm.__version__
    assert versions['torch'] == torch.__version__
    assert {'mmengine', 'mmcv', 'mmseg'} < set(versions)
    assert facts.pop('config') == 'tiny.py'
    assert facts.pop('color_order') == 'RGB'
    assert {key: json.loads(value) for key, value in facts.items()} == dict(
        arch={key: list(x) if key != 'head_dim' else x for key, x in config.model.backbone.arch.items()},
        window_size=4,
        mean=[128.0] * 3,
        std=[64.0] * 3,
        input_size=[SIDE, SIDE],
        size_divisor=1,
        classes=['night', 'day'],
    )
    image = model.graph.input[0]
    assert image.name == 'image'
    sides = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert sides == ['batch', 3, SIDE, SIDE]


@scopes('mmdet')
def test_metadata_of_any_size(config, main):
    main('tiny.py', 'tiny.pth', '--dynamic')
    facts = {entry.key: entry.value for entry in onnx.load('tiny.onnx').metadata_props}
    assert facts['input_size'] == 'any'
    assert facts['color_order'] == 'BGR'  # as the code base loads them
    assert json.loads(facts['strides']) == [[8, 8], [16, 16], [32, 32]]


@pytest.mark.parametrize('value', [1.01, float('nan')])
@scopes('mmpretrain')
def test_graph_that_differs_is_not_written(config, tool, main, monkeypatch, value):
    own = tool.replace

    def nearly(module, scope, dynamic):
        own(module, scope, dynamic)
        module.model.head.fc.weight.data.mul_(value)

    monkeypatch.setattr(tool, 'replace', nearly)
    Path('tiny.onnx').write_text('of before')
    status, _, err = main('tiny.py', 'tiny.pth', '--shape', 64)
    assert status == 1
    assert err == 'error: the graph does not compute what torch does; no file is written\n'
    assert Path('tiny.onnx').read_text() == 'of before'


@pytest.mark.parametrize('name', ['onnx', 'onnxruntime'])
def test_missing_package_is_named(main, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    status, _, err = main('a.py', 'a.pth')
    assert status == 2
    assert name in err
    assert 'run `pip install onnx onnxruntime`' in err


@scopes('mmpretrain')
def test_quantize(config, main, tmp_path):
    write_data(tmp_path)
    (tmp_path / 'folders/light/3.png').unlink()  # no guess is right for a half
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'a.onnx', '--quantize', 'folders')
    status, out, _ = main(*args)
    assert status == 0
    small, large = (onnx.load(name) for name in ('a_int8.onnx', 'a.onnx'))
    assert list(small.metadata_props) == list(large.metadata_props)
    weights = {w.name: w for w in small.graph.initializer if w.data_type == onnx.TensorProto.INT8}
    assert len(weights) > 20
    images = [np.array(Image.open(path)) for path in sorted(tmp_path.glob('folders/*/*.png'))]
    x = ((torch.from_numpy(np.stack(images)).float() - 128) / 64).permute(0, 3, 1, 2)
    ours, theirs = (outputs_of(name, x)['logits'] for name in ('a_int8.onnx', 'a.onnx'))
    assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()
    labels = torch.tensor([0, 0, 1])  # folders/dark, folders/light
    top1 = [100 * (y.argmax(1) == labels).double().mean() for y in (theirs, ours)]
    said = f'top-1 of 3 validation images: onnxruntime {top1[0]:.2f} %, onnxruntime, int8 {top1[1]:.2f} %'
    assert said in out
    assert 'onnxruntime, int8 ' in out.splitlines()[-2]  # and was timed
    shutil.rmtree('folders')
    (tmp_path / 'other').mkdir()
    Image.fromarray(images[0]).save('other/a.PNG')
    assert 'the validation images of tiny.py are not there' in main(*args[:-1], 'other')[1]


@scopes('mmseg')
def test_quantize_a_segmentor(config, main, tmp_path):
    write_data(tmp_path)
    status, out, _ = main('tiny.py', 'tiny.pth', '--dynamic', '--quantize', 'coco/images')
    assert status == 0
    assert 'top-1' not in out
    x = torch.randn(2, 3, 50, 64)
    ours, theirs = (outputs_of(name, x)['logits'] for name in ('tiny_int8.onnx', 'tiny.onnx'))
    assert (ours - theirs).norm() < 0.3 * theirs.norm()


def test_images_are_spread_over_all(tool, tmp_path, monkeypatch):
    quantize = sys.modules['quantize']
    monkeypatch.setattr(quantize, 'IMAGES', 3)
    for name in ('b/1.png', 'a/2.JPG', 'a/1.png', 'c.jpeg', 'b/2.png', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in quantize.find_images(tmp_path)]
    assert names == ['a/1.png', 'b/1.png', 'c.jpeg']


@scopes('mmpretrain')
def test_wrong_use(config, main, tmp_path):
    write_data(tmp_path)
    (tmp_path / 'empty').mkdir()
    shape = ('--shape', 64)
    (tmp_path / 'none.py').write_text('model = dict()')
    for args, message in (
        (['gone.py', 'tiny.pth'], 'gone.py'),
        (['none.py', 'tiny.pth'], 'none.py: it has no model with a backbone'),
        (['tiny.py', 'gone.pth', *shape], 'gone.pth: no such checkpoint file'),
        (['tiny.py', 'tiny.pth'], 'give one with --shape H W'),
        (['tiny.py', 'tiny.pth', '--shape', 1, 2, 3], 'shape is [1, 2, 3]'),
        (['tiny.py', 'tiny.pth', *shape, '--quantize', 'empty'], '--quantize is empty: no images there'),
        (['tiny.py', 'tiny.pth', *shape, '--quantize', 'folders', '--backbone'], 'leave out --backbone'),
        (
            ['tiny.py', 'tiny.pth', '--shape', 64, 96, '--quantize', 'folders'],
            'takes 64 x 96 (--shape); export',
        ),
    ):
        status, _, err = main(*args)
        assert status == 2
        assert err.startswith('error: ')
        assert message in err
    config.model.backbone = dict(type='ResNet', depth=18)
    torch.save(dict(state_dict=model_of(config).state_dict()), 'other.pth')
    config.dump('other.py')
    assert 'its backbone is ResNet, not EMOv2' in main('other.py', 'other.pth', *shape)[2]


@pytest.mark.slow
@scopes('mmpretrain')
def test_as_a_program(config, tmp_path):
    result = run(tmp_path, 'export_onnx.py', 'tiny.py', 'tiny.pth', '--shape', 64)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    assert result.stdout.splitlines()[0].startswith('onnxruntime against torch')
