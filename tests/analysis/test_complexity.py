"""Parameters and multiply-adds agree with the published tables."""

from __future__ import annotations

import json

import model_zoo
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import ROOT, SEGMENTOR, SIDE, call_tool, run, write_config
from mmengine.config import Config
from torch import nn

from emo2_mm.analysis import complexity
from emo2_mm.attention import SEWMHSA

# The paper's: parameters, and multiply-adds in millions at 224 x 224.
CLASSIFIERS = {
    '1m': (1_460_844, 284.757),
    '2m': (2_384_312, 487.455),
    '5m': (5_126_440, 1035.474),
    '20m': (20_195_208, 4017.165),
    '50m': (49_815_560, 8804.167),
}
# Multiply-adds in billions at 800 x 1280. (The paper's own are a mean over images of all shapes.)
RETINANETS = {'1m': 157.7, '2m': 162.6, '5m': 175.3, '20m': 242.4}

# What the paper reports is read from the metafiles, as the model zoo is.
MODELS = {model['Name']: model for model in model_zoo.models()}


@pytest.fixture
def main(capsys):
    """Run the tool in this process; returns its exit status, its output and its errors."""

    def run(*args):
        return (call_tool('get_flops.py', *args), *capsys.readouterr())

    return run


def config_file(name):
    return str(ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize('arch', CLASSIFIERS)
def test_classifiers_agree_with_the_paper(arch):
    pytest.importorskip('mmpretrain')
    sizes = complexity.count(config_file(f'cls/emo2_{arch}'))
    assert sizes['shape'] == [224, 224]
    params, flops = CLASSIFIERS[arch]
    assert sizes['params'] == sizes['params_inference'] == params
    assert round(sizes['flops'] / 1e6, 3) == flops


def needs(model):
    """Skip where the code base of an entry is not installed."""
    task = model['Config'].split('/')[1]
    pytest.importorskip({'cls': 'mmpretrain', 'det': 'mmdet', 'seg': 'mmseg'}[task])


def cut(number: float) -> float:
    """As the paper prints numbers: without what follows the first decimal."""
    return int(number * 10) / 10


def printed_params(name, params):
    """As the paper prints parameters, in millions: cut, but for one that it rounds, 20.399798."""
    return round(params / 1e6, 1) if name == 'segformer_emo2_20m' else cut(params / 1e6)


def takes_seconds(name):
    return any(part in name for part in ('retinanet', 'mask-rcnn', '20m', '50m'))


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow) if takes_seconds(name) else name for name in MODELS]
)
def test_sizes_agree_with_the_model_zoo_and_the_paper(name):
    needs(MODELS[name])
    sizes = complexity.count(str(ROOT / MODELS[name]['Config']))
    meta = MODELS[name]['Metadata']
    keys = ('Parameters', 'Inference Parameters', 'FLOPs', 'Input Size')
    assert model_zoo.measured(sizes) == {key: meta[key] for key in keys if key in meta}
    assert (sizes['params'] > sizes['params_inference']) == ('deeplab' in name or 'psp' in name)
    if 'Results' not in MODELS[name]:
        return

    assert printed_params(name, sizes['params_inference']) == meta['Reported Parameters (M)']
    if 'Reported FLOPs (M)' in meta:
        assert sizes['shape'] == [224, 224]
        assert round(sizes['flops'] / 1e6) == meta['Reported FLOPs (M)']
        return
    flops, reported = sizes['flops'] / 1e9, meta['Reported FLOPs (G)']
    if 'retinanet' in name:
        assert sizes['shape'] == [800, 1280]
        assert round(flops, 1) == RETINANETS[name.split('_')[-1]]
        assert sum(flops for _, flops in sizes['parts'].values()) == sizes['flops']
        assert 1.10 < flops / reported < 1.12
    elif 'mask-rcnn' in name:
        assert sizes['shape'] == [800, 1280]
        assert 1.06 < flops / reported < 1.08
    else:
        assert cut(flops) == reported


@pytest.mark.parametrize('name', [name for name in MODELS if 'retinanet' in name or 'mask-rcnn' in name])
def test_parameters_of_large_detectors_agree_with_the_paper(name):
    needs(MODELS[name])
    cfg = Config.fromfile(ROOT / MODELS[name]['Config'])
    with complexity.DefaultScope.overwrite_default_scope('mmdet'):
        params = complexity.count_params(complexity.build(cfg.model))
    meta = MODELS[name]['Metadata']
    assert params == meta['Parameters']
    assert printed_params(name, params) == meta['Reported Parameters (M)']


def scaled(query):
    return query * query.shape[-1] ** -0.5


def by_matmul(query, key, value):
    return (scaled(query) @ key.transpose(-2, -1)).softmax(-1) @ value


def by_bmm(query, key, value):
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return torch.bmm(torch.bmm(scaled(q), k.transpose(1, 2)).softmax(-1), v).view_as(value)


@pytest.mark.parametrize('attention', [by_matmul, by_bmm])
def test_attention_counts_the_same_however_it_is_computed(attention, monkeypatch):
    module = SEWMHSA(channels=40, expanded_channels=140, head_dim=20, window_size=7).eval()
    x = torch.rand(1, 12, 20, 40)  # padded to 14 x 21: 12 windows of both kinds
    with torch.no_grad():
        reference = module(x)
        fused = complexity.analyzer(module, x).total()
        monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
        assert torch.allclose(module(x), reference, atol=1e-6)
        assert complexity.analyzer(module, x).total() == fused
    tokens = 14 * 21
    linear = tokens * 40 * (2 * 40 + 140)
    assert fused == linear + 12 * 49 * 49 * (40 + 140)


def test_pooling_counts_nothing_in_either_form():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    x = torch.rand(1, 8, 7, 7)
    assert complexity.analyzer(nn.AdaptiveAvgPool2d(1), x).total() == 0
    assert complexity.analyzer(Mean(), x).total() == 0


def test_json_is_printed_in_any_folder(tmp_path):
    pytest.importorskip('mmpretrain')
    done = run(tmp_path, 'get_flops.py', config_file('cls/emo2_1m'), '--json')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict(
        params=1_460_844, params_inference=1_460_844, flops=284_756_712, shape=[224, 224]
    )


def test_json_is_one_line(main, monkeypatch):
    def count(*args):
        print('what a framework has to say')
        return dict(params=3, params_inference=2, flops=1, shape=[4, 5], parts={}, skipped=[])

    monkeypatch.setattr(complexity, 'count', count)
    status, out, err = main('config.py', '--json')
    assert status == 0
    assert out == '{"params": 3, "params_inference": 2, "flops": 1, "shape": [4, 5]}\n'
    assert err == 'what a framework has to say\n'


def test_shape_and_cfg_options_change_the_table(main):
    pytest.importorskip('mmpretrain')
    options = ('model.backbone.arch=2m', 'model.head.in_channels=200', 'model.head.num_classes=10')
    status, out, _ = main(config_file('cls/emo2_1m'), '--shape', 96, 128, '--cfg-options', *options)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == 'one image of 96 x 128 (height x width)'
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.endswith(' M')}
    assert list(rows) == ['backbone', 'head', 'total']
    # 2m without the 990 classes
    assert rows['total'][:2] == [f'{(2_384_312 - 990 * 201) / 1e6:.3f}', 'M']
    assert rows['head'] == ['0.002', 'M', '0.002', 'M']
    label, _, skipped = lines[-1].partition(': ')
    assert label == 'not counted'
    assert {'add', 'gelu', 'pad'} <= set(skipped.split(', '))  # others may be in place, with another name


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['nowhere.py'], 'nowhere.py'),
        ([config_file('_base_/default_runtime')], 'it has no model'),
        ([config_file('cls/emo2_1m'), '--shape', '0'], 'shape is [0]; give height and width'),
        (
            [config_file('cls/emo2_1m'), '--cfg-options', 'default_scope=mmnone'],
            'it needs mmnone, which is not installed',
        ),
        (
            [config_file('cls/emo2_1m'), '--cfg-options', 'test_dataloader.dataset.pipeline=[]'],
            'its test pipeline fixes no image size; give one with --shape H W',
        ),
    ],
)
def test_errors_name_the_remedy(main, args, message):
    pytest.importorskip('mmpretrain')
    status, out, err = main(*args, '--json')
    assert status == 1
    assert not out
    assert err.startswith(f'error: {args[0]}: ')
    assert message in err


def resize(width, height, keep_ratio):
    return dict(type='mmdet.Resize', scale=(width, height), keep_ratio=keep_ratio)


@pytest.mark.parametrize(
    ('preprocessor', 'pipeline', 'shape'),
    [
        # segmentation: the crop, not whole images
        (dict(size=(384, 512)), [resize(2048, 512, True)], (384, 512)),
        # SSDLite: a fixed size
        ({}, [resize(512, 320, False)], (320, 512)),
        # RetinaNet: any shape within the limits, padded
        (dict(pad_size_divisor=32), [resize(1333, 800, True)], (800, 1280)),
        (dict(pad_size_divisor=32), [resize(1000, 600, True)], (608, 960)),
        (dict(pad_size_divisor=32), [resize(192, 192, True)], (192, 192)),
        # classification: the crop is the last word
        ({}, [dict(type='Resize', scale=292), dict(type='CenterCrop', crop_size=256)], (256, 256)),
    ],
)
def test_the_default_shape_is_that_of_the_published_tables(preprocessor, pipeline, shape):
    dataset = dict(type='CocoDataset', pipeline=[*pipeline, dict(type='Pack')])
    wrapped = dict(type='RepeatDataset', times=2, dataset=dataset)
    model = dict(data_preprocessor=preprocessor)
    for data in (dataset, wrapped):
        cfg = Config(dict(model=model, test_dataloader=dict(dataset=data)))
        assert complexity.default_shape(cfg) == shape


def test_auxiliary_heads_count_in_training_only(tmp_path):
    pytest.importorskip('mmseg')
    path = write_config(tmp_path, SEGMENTOR)
    alone = complexity.count(str(path))
    cfg = Config.fromfile(path)
    cfg.model.auxiliary_head = dict(cfg.model.decode_head, in_channels=16, in_index=2, channels=12)
    cfg.dump(path)
    both = complexity.count(str(path))
    assert both['shape'] == [SIDE, SIDE]
    assert both['flops'] == alone['flops']
    assert both['params_inference'] == alone['params_inference'] == alone['params']
    # a convolution, its norm, another one over its output and the input, its norm, and the classes
    convolutions = 9 * 16 * 12 + 9 * (16 + 12) * 12
    assert both['params'] - alone['params'] == convolutions + 2 * 2 * 12 + 12 * 2 + 2
    assert 'without auxiliary heads' in complexity.table(both)
    assert 'without auxiliary heads' not in complexity.table(alone)


def test_two_stages_count_the_configured_proposals(tmp_path):
    pytest.importorskip('mmdet')

    def count(proposals):
        cfg = Config.fromfile(config_file('det/mask-rcnn_emo2_1m'))
        cfg.model.test_cfg.rpn.max_per_img = proposals
        for part in ('mask_head', 'mask_roi_extractor'):  # their number follows from scores
            del cfg.model.roi_head[part]
        cfg.dump(tmp_path / 'config.py')
        return complexity.count(str(tmp_path / 'config.py'), [64, 128])

    few, many = count(10), count(300)
    layers = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    assert [sizes['parts']['roi_head'][1] for sizes in (few, many)] == [10 * layers, 300 * layers]
    cells = sum(-(-64 // s) * -(-128 // s) for s in (4, 8, 16, 32, 64))
    assert many['parts']['rpn_head'][1] == cells * (9 * 256 * 256 + 256 * 3 * (1 + 4))
    assert many['flops'] - few['flops'] == 290 * layers


def test_distilled_classifier_counts_its_student(tmp_path):
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(config_file('cls/emo2_1m'))
    cfg.model.update(type='NotRegistered', teacher=dict(type='NotRegisteredEither'))
    cfg.dump(tmp_path / 'kd.py')
    sizes = complexity.count(str(tmp_path / 'kd.py'))
    assert (sizes['params'], round(sizes['flops'] / 1e6, 3)) == CLASSIFIERS['1m']
