"""tools/export.py: a bundle finds what the library of the config finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import TINY, relative, tiny, visible
from helpers.tiny import (
    CLASSIFIER,
    DETECTOR,
    ROOT,
    SEGMENTOR,
    call_tool,
    model_of,
    run,
    write_config,
    write_data,
)
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from PIL import Image

import emo2_mm
from emo2_mm.export import environment, exporter, formats, int8, predict, report
from emo2_mm.export.compare import match_boxes

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

TEXTS = {'mmdet': DETECTOR, 'mmseg': SEGMENTOR, 'mmpretrain': CLASSIFIER}
CLASSES = ('night', 'day')


@pytest.fixture
def main(monkeypatch, capsys):
    """Run a tool in this process, with two rounds of timing; returns its exit code, output and errors."""
    interleaved = report.interleaved
    monkeypatch.setattr(report, 'interleaved', lambda runs, device: interleaved(runs, device, 2))

    def run(*args, tool='export.py'):
        return (call_tool(tool, *args), *capsys.readouterr())

    return run


def network_of(cfg):
    """The model of a config with random weights that show, the same each time."""
    model = visible(revert_sync_batchnorm(model_of(cfg)))
    if cfg.default_scope == 'mmdet' and hasattr(model.bbox_head, 'retina_cls'):
        torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)  # scores that differ
    return model.eval()


@pytest.fixture
def config(request, tmp_path, monkeypatch):
    """In a folder: the config of a scope (tiny.py), tiny.pth, and the data of both."""
    pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    cfg = Config.fromfile(write_config(tmp_path, TEXTS[request.param]))
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=network_of(cfg).state_dict(), meta=meta), 'tiny.pth')
    return cfg


def scopes(*names):
    return pytest.mark.parametrize('config', names, indirect=True)


ALL = scopes('mmdet', 'mmseg', 'mmpretrain')


def inferencer_of(cfg):
    from emo2_mm.apis import init_inferencer

    return init_inferencer(cfg, 'tiny.pth', 'cpu')


def write_photos(folder):
    """Photographs of several sizes; returns their paths."""
    folder.mkdir()
    for i, (height, width) in enumerate(((64, 64), (50, 71), (90, 40))):
        y, x = np.mgrid[0:height, 0:width]
        waves = [127 + 100 * np.sin(x / (3 + i) + c) + 27 * np.cos(y / 4) for c in range(3)]
        Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return sorted(folder.iterdir())


def assert_agrees(model, inferencer, path, scope):
    """A bundle and the library's inferencer find the same in an image."""
    sample = inferencer(str(path), return_datasamples=True)
    prepared = model.prepare(path)
    if scope == 'mmpretrain':
        found = model.run(prepared.array)['probabilities'][0]
        np.testing.assert_allclose(found, sample[0].pred_score.numpy(), atol=1e-5)
    elif scope == 'mmseg':
        assert (model.map(prepared) == sample.pred_sem_seg.data[0].numpy()).mean() >= 0.999
    else:
        expected = sample['predictions'][0].pred_instances
        dets = torch.cat([expected.bboxes, expected.scores[:, None]], 1).numpy()
        found = model.detections(prepared)[:2]
        assert len(dets) == len(found[0]) == 10
        assert len(match_boxes(found, (dets, expected.labels.numpy()))[0]) == 10


@ALL
def test_a_bundle_of_one_size_agrees_with_the_library(config, main):
    """On images of that size, also in batches, and where predict.py chooses among the boxes."""
    names = ['onnx', 'torchscript']
    status, out, err = main('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'new/b', '--format', *names)
    assert (status, err) == (0, '')
    inferencer = inferencer_of(config)
    for name in names:
        model = predict.Model('new/b', name)
        for path in sorted(Path('coco/images').iterdir()):
            assert_agrees(model, inferencer, path, config.default_scope)
    images = [model.prepare(path).array for path in sorted(Path('coco/images').iterdir())]
    model = predict.Model('new/b')
    batch = model.run(np.concatenate(images))
    for i, image in enumerate(images):
        for key, value in model.run(image).items():
            np.testing.assert_allclose(batch[key][i], value[0], rtol=1e-4, atol=1e-4)


@scopes('mmdet', 'mmseg')
def test_a_bundle_of_any_size_agrees_with_the_library(config, main, tmp_path):
    if config.default_scope == 'mmdet':
        options = ['model.data_preprocessor.pad_size_divisor=32', 'model.data_preprocessor.bgr_to_rgb=True']
        config.merge_from_dict({o.split('=')[0]: eval(o.split('=')[1]) for o in options})
    config.dump('tiny.py')
    assert main('tiny.py', 'tiny.pth', '--dynamic', '--out', 'b')[0] == 0
    model, inferencer = predict.Model('b'), inferencer_of(config)
    for path in write_photos(tmp_path / 'photos'):
        assert_agrees(model, inferencer, path, config.default_scope)


def skip_without(name):
    missing = formats.FORMATS[name].missing()
    if missing:
        pytest.skip(f'needs {", ".join(missing)}')


@pytest.mark.parametrize('name', ['openvino', 'ncnn', 'mnn'])
@ALL
def test_other_runtimes(config, main, name):
    skip_without(name)
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--format', name)
    half = ('--half',) if 'fp16' in formats.FORMATS[name].precisions else ()
    assert main(*args, *half)[0] == 0
    inferencer = inferencer_of(config)
    for path in sorted(Path('coco/images').iterdir()):
        assert_agrees(predict.Model('b', name), inferencer, path, config.default_scope)


@ALL
def test_core_ml_is_interpreted_and_not_run(config, main):
    skip_without('coreml')
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--format', 'coreml', '--half')
    status, out, err = main(*args)
    assert (status, err) == (0, '')
    models = json.loads(Path('b/model.json').read_text())['models']
    for name, limit in (('coreml', 1e-5), ('coreml-fp16', 1e-2)):
        assert 0 < float(models[name]['error'].replace(' (interpreted, not run)', '')) < limit
        assert 'ms' not in models[name]
    assert 'checked by an interpreter of its operations in torch, not run' in Path('b/README.md').read_text()
    assert predict.main(['coco/images', '--out', 'o', '--bundle', 'b']) == 2


@scopes('mmdet', 'mmseg')
def test_mnn_takes_images_of_any_size(config, main, tmp_path):
    skip_without('mnn')
    assert main('tiny.py', 'tiny.pth', '--dynamic', '--out', 'b', '--format', 'mnn')[0] == 0
    model, inferencer = predict.Model('b'), inferencer_of(config)
    for path in write_photos(tmp_path / 'photos'):
        assert_agrees(model, inferencer, path, config.default_scope)


@scopes('mmpretrain')
def test_notes_of_a_format_are_its_own(config, main):
    """Formats share what they convert, and an int8 one of ONNX leaves layers in float."""
    skip_without('mnn')
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--batch', 1, '--quantize', 'folders')
    assert main(*args, '--format', 'mnn', 'onnx')[0] == 0
    models = json.loads(Path('b/model.json').read_text())['models']
    assert [name for name, entry in models.items() if 'float_layers' in entry] == ['onnx-int8']
    assert [name for name, entry in models.items() if 'weights alone' in str(entry['limits'])] == ['mnn-int8']


@pytest.fixture(params=['litert', 'executorch'])
def form(request):
    """A format whose packages may be in an environment of its own."""
    found = formats.FORMATS[request.param]
    if found.missing():
        pytest.skip(f'{", ".join(found.missing())} missing; run {"; ".join(found.environment)}')
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@ALL
def test_formats_with_environments_of_their_own(config, main, form):
    """Also in smaller precisions, and by predict.py as a program there."""
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--format', form.name)
    small = [precision for precision in form.precisions if precision != 'fp32']
    more = dict(fp16=['--half'], int8=['--quantize', 'coco/images'])
    status, out, err = main(*args, *[option for each in small for option in more[each]])
    assert (status, err) == (0, '')
    with environment.runtimes({form.name: form.python()}):
        models = [predict.Model('b', '-'.join((form.name, *p))) for p in [(), *([p] for p in small)]]
        inferencer = inferencer_of(config)
        for path in sorted(Path('coco/images').iterdir()):
            assert_agrees(models[0], inferencer, path, config.default_scope)
        answers = models[0](path, 0.0)
        outputs = [model.run(model.prepare(path).array) for model in models]
        assert outputs[0].keys() == {output['name'] for output in models[0].entry['outputs']}
    assert [output['dtype'] for output in models[0].entry['outputs']] == [
        str(y.dtype) for y in outputs[0].values()
    ]
    for rough, largest in zip(outputs[1:], (0.01, 0.2)):
        name = 'logits' if 'logits' in rough else next(iter(rough))
        difference = np.linalg.norm(rough[name] - outputs[0][name])
        assert 0 < difference < largest * np.linalg.norm(outputs[0][name])
    sizes = [model.entry['MB'] for model in models]
    assert sizes == sorted(sizes, reverse=True)
    command = [form.python(), 'b/predict.py', 'coco/images', '--out', 'out', '--score-thr', '0']
    result = subprocess.run(command, capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'})
    assert result.returncode == 0, result.stderr
    found = json.loads(Path(f'out/preds/{path.name}.json').read_text())
    for key in {'objects', 'classes', 'segments'} & answers.keys():
        assert found[key] == answers[key]
    if form.name == 'litert':
        for name in ('model', 'model-fp16', 'model-int8'):
            assert b'"night", "day"' in Path(f'b/{name}.tflite').read_bytes()  # metadata


@pytest.mark.slow
@pytest.mark.timeout(600)
@scopes('mmpretrain')
def test_a_fixed_batch_in_an_environment_of_its_own(config, main, form):
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--batch', 3, '--format', form.name)
    assert main(*args)[0] == 0
    with environment.runtimes({form.name: form.python()}):
        model = predict.Model('b')
        assert model.entry['input']['shape'] == [3, 64, 64, 3]
        assert_agrees(model, inferencer_of(config), sorted(Path('coco/images').iterdir())[1], 'mmpretrain')


def write_checkpoint(path):
    """The model of a real config with random weights that show."""
    cfg = Config.fromfile(ROOT / path)
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = visible(revert_sync_batchnorm(model_of(cfg)))
    for name, p in model.named_parameters():
        if p.ndim == 4 and not name.startswith('backbone'):
            torch.nn.init.xavier_normal_(p, 4.0 if 'bbox_head.cls_convs' in name else 0.7)
        elif 'fc_cls.weight' in name:
            torch.nn.init.normal_(p, std=0.3)
    torch.save(dict(state_dict=model.state_dict()), 'tiny.pth')
    return cfg


@pytest.mark.slow
def test_ssdlite_agrees_with_the_library(main, tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    cfg = write_checkpoint('configs/det/ssdlite_emo2_1m_320.py')
    assert main(cfg.filename, 'tiny.pth', '--out', 'b', '--format', 'onnx', 'torchscript')[0] == 0
    inferencer = inferencer_of(cfg)
    for name in ('onnx', 'torchscript'):
        model = predict.Model('b', name)
        for path in write_photos(tmp_path / name):
            expected = inferencer(str(path), return_datasamples=True)['predictions'][0].pred_instances
            dets = torch.cat([expected.bboxes, expected.scores[:, None]], 1).numpy()
            found = model.detections(model.prepare(path))[:2]
            assert len(match_boxes(found, (dets, expected.labels.numpy()))[0]) >= 0.995 * len(dets) > 100


@pytest.mark.slow
def test_mask_rcnn_agrees_with_the_library(main, tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    cfg = write_checkpoint('configs/det/mask-rcnn_emo2_1m.py')
    scale = dict(type='Resize', scale=(160, 128), keep_ratio=True)
    cfg.test_dataloader.dataset.pipeline[1] = scale
    cfg.model.test_cfg.rpn.max_per_img = 100
    cfg.model.test_cfg.rcnn.score_thr = 0.005  # random weights: a score of 1 / 81 on average
    cfg.dump('tiny.py')
    assert main('tiny.py', 'tiny.pth', '--dynamic', '--out', 'b')[0] == 0
    inferencer, model = inferencer_of(Config.fromfile('tiny.py')), predict.Model('b')
    for path in write_photos(tmp_path / 'photos'):
        expected = inferencer(str(path), return_datasamples=True)['predictions'][0].pred_instances
        dets = torch.cat([expected.bboxes, expected.scores[:, None]], 1).numpy()
        prepared = model.prepare(path)
        boxes, labels, masks = model.detections(prepared)
        ours, theirs = match_boxes((boxes, labels), (dets, expected.labels.numpy()))
        assert len(ours) >= 0.99 * len(dets) > 50
        pasted = [predict.paste_mask(masks[i], boxes[i], prepared.size, 0.5) for i in ours]
        assert (np.stack(pasted) == expected.masks.numpy()[theirs]).mean() > 0.999
    assert 'mask' in model(path, 0.0)['objects'][0]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['fpn', 'pspnet', 'segformer', 'deeplabv3'])
def test_segmentors_agree_with_the_library(method, main, tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)
    cfg = write_checkpoint(f'configs/seg/{method}_emo2_1m.py')
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(204, 96), keep_ratio=True)
    cfg.dump('tiny.py')
    assert main('tiny.py', 'tiny.pth', '--dynamic', '--out', 'b')[0] == 0
    inferencer, model = inferencer_of(Config.fromfile('tiny.py')), predict.Model('b')
    for path in write_photos(tmp_path / 'photos'):
        assert_agrees(model, inferencer, path, 'mmseg')


@scopes('mmdet')
def test_what_a_bundle_says(config, main):
    options = ('--cfg-options', 'model.data_preprocessor.bgr_to_rgb=True')
    assert main('tiny.py', 'tiny.pth', '--out', 'b', *options)[0] == 0
    names = sorted(path.name for path in Path('b').iterdir())
    assert names == ['README.md', 'example.png', 'model.json', 'model.onnx', 'predict.py']
    meta = json.loads(Path('b/model.json').read_text())
    entry = meta['models']['onnx']
    assert meta['task'] == 'detection'
    assert meta['classes'] == ['night', 'day']
    assert meta['color_order'] == 'RGB'
    assert meta['input_size'] == [64, 64]
    assert meta['nms'] == dict(score_thr=0.0, iou_thr=0.5, pre=100, max=10, min_size=-1.0)
    assert meta['versions']['emo2_mm'] == emo2_mm.__version__
    assert meta['config'] == 'tiny.py'
    assert len(meta['checkpoint_sha256']) == 64
    assert entry['input'] == dict(
        name='image', dtype='uint8', layout='NHWC', shape=['batch', 64, 64, 3], normalized_inside=True
    )
    shapes = {output['name']: output['shape'] for output in entry['outputs']}
    assert shapes == dict(dets=['batch', 10, 5], labels=['batch', 10])
    assert float(entry['error']) < 1e-5
    model = onnx.load('b/model.onnx')
    inside = {item.key: item.value for item in model.metadata_props}
    assert json.loads(inside['classes']) == meta['classes']
    assert inside['task'] == 'detection'
    inferred = onnx.shape_inference.infer_shapes(model)
    assert max(len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info) <= 4
    assert Image.open('b/example.png').size == (64, 64)
    assert Path('b/predict.py').read_bytes() == Path(predict.__file__).read_bytes()
    readme = Path('b/README.md').read_text()
    assert 'pip install numpy pillow onnxruntime\npython predict.py IMAGE_OR_FOLDER' in readme
    assert '`image`, batch x 64 x 64 x 3 uint8, RGB' in readme


@scopes('mmdet')
def test_raw_maps_come_with_their_anchors(config, main):
    """From the maps, anchors and coder of model.json follow the boxes of the other bundle."""
    assert main('tiny.py', 'tiny.pth', '--out', 'raw', '--raw')[0] == 0
    assert main('tiny.py', 'tiny.pth', '--out', 'b', '--format', 'torchscript')[0] == 0
    raw, model = predict.Model('raw'), predict.Model('b')
    path = sorted(Path('coco/images').iterdir())[0]
    maps = raw.run(raw.prepare(path).array)
    coder, found = raw.meta['box_coder'], []
    for level, (base, stride) in enumerate(zip(raw.meta['anchors']['base'], raw.meta['strides'])):
        deltas = maps[f'bbox_pred_{level}'][0]
        y, x = np.mgrid[0 : deltas.shape[1], 0 : deltas.shape[2]]
        deltas = deltas.reshape(len(base), 4, -1).transpose(2, 0, 1) * coder['stds'] + coder['means']
        anchors = np.stack([x, y, x, y], -1).reshape(-1, 1, 4) * (stride * 2) + np.array(base)
        center, side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
        center = center + deltas[..., :2] * side
        half = side * np.exp(deltas[..., 2:].clip(-coder['largest_log_side'], coder['largest_log_side'])) / 2
        found.append(np.concatenate([center - half, center + half], -1).reshape(-1, 4).clip(0, 64))
    np.testing.assert_allclose(
        np.concatenate(found), model.run(model.prepare(path).array)['boxes'][0], atol=1e-3
    )
    with pytest.raises(ValueError, match='gives raw, which are not decoded'):
        raw(path)


@ALL
def test_float_input_is_the_same(config, main):
    args = ('tiny.py', 'tiny.pth', '--shape', 64)
    assert main(*args, '--out', 'a')[0] == main(*args, '--out', 'b', '--float-input')[0] == 0
    for path in sorted(Path('coco/images').iterdir()):
        a, b = (predict.Model(name) for name in 'ab')
        assert b.prepare(path).array.dtype == np.float32
        for ours, theirs in zip(a.run(a.prepare(path).array).values(), b.run(b.prepare(path).array).values()):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@scopes('mmpretrain')
def test_a_fixed_batch_takes_fewer_images(config, main):
    assert main('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--batch', 3)[0] == 0
    model = predict.Model('b')
    assert model.entry['input']['shape'] == [3, 64, 64, 3]
    image = sorted(Path('coco/images').iterdir())[1]
    assert_agrees(model, inferencer_of(config), image, 'mmpretrain')
    assert len(model.run(model.prepare(image).array)['probabilities']) == 1


@scopes('mmpretrain')
def test_the_example_is_prepared_by_the_model_size(config, main):
    """Where the pipeline fixes no size, an image of another one is resized."""
    assert main('tiny.py', 'tiny.pth', '--shape', 48, 32, '--out', 'b')[0] == 0
    model = predict.Model('b')
    assert model.prepare(np.zeros((100, 90, 3), np.uint8)).array.shape == (1, 48, 32, 3)
    assert len(model(np.zeros((100, 90, 3), np.uint8))['classes']) == 2


@pytest.mark.parametrize(('name', 'value'), [('onnx', 1.01), ('onnx', float('nan')), ('coreml', 1.01)])
@ALL
def test_a_model_that_differs_leaves_nothing(config, main, monkeypatch, name, value):
    skip_without(name)
    own = exporter.replace

    def nearly(network, scope, dynamic):
        own(network, scope, dynamic)
        next(p for n, p in network.named_parameters() if 'backbone.stages.3' in n).data.mul_(value)

    monkeypatch.setattr(exporter, 'replace', nearly)
    before = {path.name for path in Path().iterdir()}
    status, _, err = main('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--format', name)
    assert status == 1
    assert err.startswith(f'error: {name}: ')
    assert err.endswith('nothing is written\n')
    assert {path.name for path in Path().iterdir()} == before


@scopes('mmpretrain')
def test_an_earlier_bundle_is_replaced_but_no_other_folder(config, main):
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b')
    assert main(*args)[0] == 0
    Path('b/note').touch()
    assert main(*args)[0] == 0
    assert not Path('b/note').exists()
    status, _, err = main(*args[:-1], 'coco')
    assert status == 1
    assert 'a folder with other files in it' in err
    assert Path('coco/images').is_dir()


@ALL
def test_int8_and_half(config, main):
    shutil.copytree('coco/images', 'some')
    Path('some/9.png').write_bytes(b'damaged')
    status, out, err = main(
        *('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--half', '--quantize', 'some')
    )
    assert status == 0
    assert err.count('9.png (') == 1  # skipped and named
    models = {name: predict.Model('b', name) for name in ('onnx', 'onnx-fp16', 'onnx-int8')}
    small = onnx.load('b/model-int8.onnx').graph
    kinds = {w.data_type for w in small.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert (
        sum(w.data_type == onnx.TensorProto.FLOAT16 for w in onnx.load('b/model-fp16.onnx').graph.initializer)
        > 9
    )
    heads = {'mmdet': 'bbox_mAP', 'mmseg': 'mIoU', 'mmpretrain': 'top1'}
    for name, model in models.items():
        assert f'{name}: ' in out
        assert model.entry['accuracy']['metric'].endswith(heads[config.default_scope])
    array = models['onnx'].prepare('coco/images/0.png').array
    exact, half, rough = (next(iter(m.run(array).values()))[0].astype(float) for m in models.values())
    if config.default_scope == 'mmseg':
        exact, half, rough = (m.run(array)['logits'].astype(float) for m in models.values())
    assert 0 < np.linalg.norm(half - exact) < 0.01 * np.linalg.norm(exact)
    if config.default_scope != 'mmdet':  # boxes may come in another order
        assert 0 < np.linalg.norm(rough - exact) < 0.2 * np.linalg.norm(exact)


@scopes('mmpretrain')
def test_accuracy_is_that_of_the_validation_data(config, main):
    """Of three images, for no guess is right for a half."""
    Path('folders/light/3.png').unlink()
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--quantize', 'folders')
    assert main(*args)[0] == 0
    model = predict.Model('b')
    images = [*sorted(Path('folders/dark').iterdir()), *sorted(Path('folders/light').iterdir())]
    right = sum(model(path)['classes'][0]['label'] == label for path, label in zip(images, (0, 0, 1)))
    assert model.entry['accuracy']['value'] == pytest.approx(100 * right / 3, abs=0.01)
    config.val_dataloader.dataset.data_root = 'gone'
    config.dump('gone.py')
    status, out, _ = main('gone.py', *args[1:])
    assert status == 0
    assert 'no accuracy: the validation data of gone.py are not there' in out


@scopes('mmpretrain')
def test_parts_that_int8_spoils_stay_in_float(config, main, monkeypatch):
    own = int8.measure_parts

    def measure(*args):
        return {part: 0.3 if part == 'head/fc' else error for part, error in own(*args).items()}

    monkeypatch.setattr(int8, 'measure_parts', measure)
    args = ('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b', '--quantize', 'folders')
    assert main(*args)[0] == 0
    assert predict.Model('b', 'onnx-int8').entry['float_layers'] == ['head/fc (30.0% alone)']
    assert 'Layers left in float: head/fc (30.0% alone)' in Path('b/README.md').read_text()
    graph = onnx.load('b/model-int8.onnx').graph
    weights = {w.name: w.data_type for w in graph.initializer if 'head.fc.weight' in w.name}
    assert set(weights.values()) == {onnx.TensorProto.FLOAT}
    monkeypatch.setattr(int8, 'LARGEST_ERROR', 0.0)
    status, _, err = main(*args)
    assert status == 1
    assert 'int8 changes the result of every part' in err


def test_images_are_spread_over_all(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, 'IMAGES', 3)
    for name in ('b/1.png', 'a/2.JPG', 'a/1.png', 'c.jpeg', 'b/2.png', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in int8.find_images(tmp_path)]
    assert names == ['a/1.png', 'b/1.png', 'c.jpeg']


def test_a_backbone_alone(main, tmp_path, monkeypatch):
    """Of published weights, without a library of a task."""
    monkeypatch.chdir(tmp_path)
    backbone = dict(type='emo2_mm.EMOv2', arch=TINY, window_size=3, out_indices=(1, 3))
    Path('a.py').write_text(f'model = dict(backbone={backbone})')
    model = tiny(out_indices=(1, 3)).eval()
    torch.save(model.state_dict(), 'published.pth')
    args = ('a.py', 'published.pth', '--backbone', '--float-input', '--shape', 40, 56, '--out', 'b')
    assert main(*args)[0] == 0
    x = torch.randn(3, 3, 40, 56)
    found = predict.Model('b').run(x.numpy())
    assert list(found) == ['stride_8', 'stride_32']
    with torch.no_grad():
        for ours, theirs in zip(found.values(), model(x)):
            assert relative(torch.from_numpy(ours), theirs) < 1e-5


@scopes('mmseg')
def test_the_old_name_writes_one_file(config, main):
    args = ('tiny.py', 'tiny.pth', '--out', 'new/a.onnx', '--quantize', 'coco/images')
    assert main(*args, tool='export_onnx.py')[0] == 0
    assert sorted(path.name for path in Path('new').iterdir()) == ['a.onnx', 'a_int8.onnx']
    session = onnxruntime.InferenceSession('new/a.onnx', providers=['CPUExecutionProvider'])
    x = torch.randn(2, 3, 64, 64)
    (found,) = session.run(['logits'], {'image': x.numpy()})
    with torch.no_grad():
        expected = network_of(config).encode_decode(x, [dict(img_shape=(64, 64))])
    assert relative(torch.from_numpy(found), expected) < 1e-5


@scopes('mmpretrain')
def test_wrong_use(config, main, monkeypatch):
    Path('empty').mkdir()
    Path('none.py').write_text('model = dict()')
    given = ('tiny.py', 'tiny.pth')
    shape = ('--shape', 64)
    torch.save(
        dict(state_dict=network_of(config).state_dict(), meta=dict(dataset_meta=dict(classes='abc'))), 'x.pth'
    )
    content = torch.load('x.pth')
    content['meta']['dataset_meta']['classes'] = ['a', 'b', 'c']
    torch.save(content, 'three.pth')
    for args, message in (
        (['gone.py', 'tiny.pth'], 'gone.py'),
        (['none.py', 'tiny.pth', *shape], 'none.py: it has no model with a backbone'),
        (['tiny.py', 'gone.pth', *shape], 'gone.pth: no such checkpoint file'),
        (['tiny.py', 'three.pth', *shape], 'three.pth names 3 classes (a, b, c ...), but the model'),
        ([*given], 'give one with --shape H W'),
        ([*given, '--shape', 1, 2, 3], 'shape is [1, 2, 3]'),
        ([*given, *shape, '--batch', 0], '--batch is 0'),
        (
            [*given, *shape, '--format', 'tensorrt'],
            '--format tensorrt is unknown; give one of onnx, openvino',
        ),
        ([*given, *shape, '--quantize', 'empty'], '--quantize is empty: no images there'),
        ([*given, *shape, '--quantize', 'folders', '--backbone'], 'leave out --backbone'),
        (
            [*given, *shape, '--half', '--format', 'torchscript'],
            'none of --format torchscript has fp16; onnx',
        ),
    ):
        status, _, err = main(*args, '--out', 'b')
        assert status == 2
        assert err.startswith('error: ')
        assert message in err
        assert not Path('b').exists()
    status, _, err = main(
        *given, '--dynamic', '--format', 'torchscript', '--out', 'b', '--cfg-options', 'a=1'
    )
    assert status == 2  # no size is known
    with monkeypatch.context() as patch:
        patch.setattr(formats.Format, 'missing', lambda self: ['openvino'])
        status, _, err = main(*given, *shape, '--format', 'openvino', '--out', 'b')
    assert status == 2
    assert 'needs openvino, not installed here; run\n  pip install onnx openvino' in err
    config.model.backbone = dict(type='ResNet', depth=18)
    torch.save(dict(state_dict=network_of(config).state_dict()), 'other.pth')
    config.dump('other.py')
    assert 'its backbone is ResNet, not EMOv2' in main('other.py', 'other.pth', *shape, '--out', 'b')[2]
    assert 'weights of' in main('tiny.py', 'other.pth', *shape, '--out', 'b')[2]


@scopes('mmdet')
def test_a_report_lists_what_failed(config, main, monkeypatch):
    def fail(source, folder, precision):
        (folder / 'half').mkdir()
        (folder / 'half/model.pt').touch()
        raise RuntimeError('no')

    broken = formats.Format('torchscript', '', (), '', '', fail)
    monkeypatch.setitem(formats.FORMATS, 'torchscript', broken)
    args = ('tiny.py', 'tiny.pth', '--format', 'onnx', 'torchscript', '--out', 'b')
    assert main(*args)[0] == 1
    assert not Path('b').exists()
    assert main(*args, '--report')[0] == 0
    rows = json.loads(Path('b/report.json').read_text())
    assert [row['model'] for row in rows] == ['torch', 'onnx', 'torchscript']
    assert rows[2]['error'] == 'failed: no'
    assert not Path('b/half').exists()
    assert '| onnx |' in Path('b/report.md').read_text()
    assert list(predict.Model('b').meta['models']) == ['onnx']


@scopes('mmseg')
def test_all_leaves_out_formats_that_cannot_hold_the_model(config, main, monkeypatch):
    onnx_and_torch = {name: formats.FORMATS[name] for name in ('onnx', 'torchscript')}
    monkeypatch.setattr(formats, 'FORMATS', onnx_and_torch)
    status, out, _ = main('tiny.py', 'tiny.pth', '--format', 'all', '--dynamic', '--out', 'b')
    assert status == 0
    assert 'torchscript: failed, it takes images of one size; leave out --dynamic' in out
    assert list(predict.Model('b').meta['models']) == ['onnx']
    args = ('tiny.py', 'tiny.pth', '--format', 'onnx', 'torchscript', '--dynamic', '--out', 'c')
    assert main(*args)[0] == 1
    assert not Path('c').exists()


@scopes('mmdet', 'mmseg', 'mmpretrain')
def test_predict_writes_what_infer_writes(config, main, capsys):
    """The same keys, and the same objects."""
    assert main('tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b')[0] == 0
    Path('coco/images/9.png').write_bytes(b'damaged')
    assert predict.main(['coco/images', '--out', 'ours', '--bundle', 'b', '--score-thr', '0']) == 1
    out, err = capsys.readouterr()
    assert '[5/5] 9.png: skipped' in out
    assert '1 of 5 files were skipped: 9.png' in err
    Path('coco/images/9.png').unlink()
    call_tool('infer.py', 'tiny.py', 'tiny.pth', 'coco/images', '--out', 'theirs', '--score-thr', 0)
    for i in range(4):
        ours, theirs = (
            json.loads(Path(f'{name}/preds/{i}.png.json').read_text()) for name in ('ours', 'theirs')
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, list):
                assert [x['class'] for x in ours[key]] == [x['class'] for x in value]
                assert ours[key][0].keys() == value[0].keys()
            else:
                assert ours[key] == value
        assert Image.open(f'ours/vis/{i}.png').size == (64, 64)
    if config.default_scope == 'mmseg':
        maps = [np.array(Image.open(f'{name}/preds/0.png.png')) for name in ('ours', 'theirs')]
        assert np.array_equal(*maps)


def test_predict_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    for images, message in (('gone', 'no such image or folder'), ('empty', 'no images there')):
        assert predict.main([str(tmp_path / images), '--out', str(tmp_path / 'o')]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@scopes('mmdet')
def test_predict_in_an_environment_without_torch(config, main, tmp_path):
    """NumPy, Pillow and ONNX Runtime alone, and no package of this project."""
    assert main('tiny.py', 'tiny.pth', '--out', 'b')[0] == 0
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv/bin/python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', 'numpy', 'pillow', 'onnxruntime'], check=True)
    listed = subprocess.run([python, '-m', 'pip', 'list'], check=True, capture_output=True, text=True).stdout
    assert 'torch' not in listed
    command = [python, 'b/predict.py', 'coco/images', '--out', 'out', '--score-thr', '0']
    result = subprocess.run(command, capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'})
    assert (result.returncode, result.stderr) == (0, '')
    found = json.loads(Path('out/preds/0.png.json').read_text())
    expected = predict.Model('b')('coco/images/0.png', 0.0)
    assert found['objects'] == expected['objects']
    command = [
        python,
        '-c',
        "from predict import Model; print(Model('.')('../coco/images/0.png', 0.0)['width'])",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd='b', env={'PATH': '/usr/bin:/bin'})
    assert result.stdout == '64\n', result.stderr


@pytest.mark.slow
@scopes('mmpretrain')
def test_as_a_program(config, tmp_path):
    result = run(tmp_path, 'export.py', 'tiny.py', 'tiny.pth', '--shape', 64, '--out', 'b')
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    assert result.stdout.splitlines()[0].startswith('onnx: error ')
    assert sys.executable
