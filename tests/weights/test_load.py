"""Backbone weights are found in files of any layout; files of other networks are refused."""

from __future__ import annotations

import argparse
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import assert_equal, logging_objects, other, prefixed
from helpers.golden import generated_state_dict, golden_cases, normal, relative_error
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from emo2_mm import EMOv2
from emo2_mm.weights.load import find_arch, find_state_dict, load_backbone_weights

pytestmark = pytest.mark.both_stacks

ARCHS = EMOv2.arch_settings


@pytest.fixture(scope='module')
def published():
    return generated_state_dict('1m', 16)


@pytest.fixture(scope='module')
def reference(published, tmp_path_factory):
    """The weights of a backbone, by its own names."""
    path = tmp_path_factory.mktemp('reference') / 'bare.pth'
    torch.save(published, path)
    model = EMOv2('1m', final_norm=True)
    load_backbone_weights(model, path)
    return model.state_dict()


def test_loaded_weights_give_the_recorded_features(published, tmp_path):
    case = next(c for c in golden_cases() if c['seed'] == 16)
    torch.save(published, tmp_path / 'file.pth')
    checkpoint = str(tmp_path / 'file.pth')
    model = EMOv2('1m', init_cfg={'type': 'Pretrained', 'checkpoint': checkpoint}).eval()
    model.init_weights()
    with torch.no_grad():
        features = model(normal((case['batch'], 3, *case['size']), case['seed'] + 1))
    for i, feature in enumerate(features):
        assert relative_error(feature, case['features'][f'stage{i + 1}']) < 1e-5


KINDS = {
    'bare': lambda p, r: p,
    'net': lambda p, r: {'net': p, 'iter': 3},
    'net_E': lambda p, r: {'net_E': p},
    'net_E beats net': lambda p, r: {'net': other(p), 'net_E': p},
    'net where net_E is empty': lambda p, r: {'net': p, 'net_E': None},
    'module.': lambda p, r: prefixed('module.', p),
    'module.module. in net_E': lambda p, r: {'net_E': prefixed('module.module.', p)},
    'own': lambda p, r: r,
    'own state_dict': lambda p, r: {'state_dict': r, 'meta': {'epoch': 1}},
    'published names in backbone.': lambda p, r: {'state_dict': prefixed('backbone.', p)},
    'mmpretrain': lambda p, r: {
        'meta': {'epoch': 1, 'classes': ('a', 'b')},
        'state_dict': {**prefixed('backbone.', r), 'head.fc.weight': torch.ones(5, 180)},
        'message_hub': logging_objects(),
        'param_schedulers': [{'milestones': Counter({8: 1})}],
    },
    'mmdet': lambda p, r: {
        'state_dict': {
            'neck.lateral_convs.0.conv.weight': torch.ones(8, 32, 1, 1),
            'norm.weight': torch.ones(2),
            **prefixed('backbone.', r),
            'bbox_head.retina_cls.weight': torch.ones(8),
        },
        'message_hub': logging_objects(),
    },
    'ema_state_dict alone': lambda p, r: {
        'ema_state_dict': {'steps': torch.tensor(7), **prefixed('module.backbone.', r)}
    },
    'average of a backbone': lambda p, r: {'steps': torch.tensor(7), **prefixed('module.', r)},
    'ema_state_dict is raw': lambda p, r: {
        'state_dict': prefixed('backbone.', r),
        'ema_state_dict': {'steps': torch.tensor(7), **prefixed('module.backbone.', other(r))},
    },
    'timm': lambda p, r: {
        'state_dict': other(p),
        'state_dict_ema': p,
        'args': argparse.Namespace(lr=1.0),
    },
    'compiled': lambda p, r: {'state_dict': prefixed('_orig_mod.backbone.module.', r)},
    'other harmless things beside': lambda p, r: {
        'state_dict': p,
        'size': torch.Size([3, 224]),
        'dtype': torch.float16,
        'device': torch.device('cpu'),
        'classes': {'cat', 'dog'},
        'path': Path('/data'),
    },
    'parameters': lambda p, r: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in p.items()},
    'no batch counters': lambda p, r: {k: v for k, v in p.items() if not k.endswith('num_batches_tracked')},
}


@pytest.mark.parametrize(('kind', 'protocol'), [*((kind, 2) for kind in KINDS), ('net', 4)])
def test_weights_are_found_in_any_layout(kind, protocol, published, reference, tmp_path):
    path = tmp_path / 'file.pth'
    torch.save(KINDS[kind](published, reference), path, pickle_protocol=protocol)
    model = EMOv2('1m', final_norm=True)
    load_backbone_weights(model, path)
    assert_equal(model.state_dict(), reference)


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = EMOv2('1m', layer_scale_init_value=0.1, out_indices=(0, 1))

    def forward(self, inputs, mode='tensor'):
        return {'loss': sum(out.square().mean() for out in self.backbone(torch.stack(inputs)))}


def test_a_checkpoint_of_the_runner_gives_the_average(tmp_path):
    data = {'dataset': [{'inputs': x} for x in normal((4, 3, 32, 32), 0)], 'batch_size': 2}
    data['sampler'] = {'type': 'DefaultSampler', 'shuffle': False}
    runner = Runner(
        Toy(),
        work_dir=str(tmp_path),
        train_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': 1},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler={'type': 'MultiStepLR', 'milestones': [1]},
        custom_hooks=[{'type': 'EMAHook', 'momentum': 0.5}],
        log_level='ERROR',
    )
    runner.train()
    average = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model.module
    path = tmp_path / 'epoch_1.pth'
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(n for n in archive.namelist() if n.endswith('data.pkl')))
    assert b'HistoryBuffer' in content and b'Counter' in content  # what weights_only refuses

    model = EMOv2('1m', out_indices=(0, 1))
    load_backbone_weights(model, path)
    assert_equal(model.state_dict(), average.backbone.state_dict())
    raw = runner.model.backbone.state_dict()
    assert not torch.equal(model.state_dict()['stem.conv.weight'], raw['stem.conv.weight'])


def test_weights_of_unused_stages_are_left_out(published, reference, tmp_path):
    torch.save(published, tmp_path / 'f.pth')
    model = EMOv2('1m', out_indices=(0, 1))
    load_backbone_weights(model, tmp_path / 'f.pth')
    assert_equal(model.state_dict(), {name: reference[name] for name in model.state_dict()})


def test_model_keeps_its_dtype_and_its_parameters(published, reference, tmp_path):
    torch.save({name: t.half() for name, t in published.items()}, tmp_path / 'f.pth')
    model = EMOv2('1m', out_indices=(0,)).double()
    weight = model.stem.conv.weight
    load_backbone_weights(model, tmp_path / 'f.pth')
    assert model.stem.conv.weight is weight and weight.requires_grad
    assert weight.dtype == torch.float64
    assert torch.equal(weight.data, reference['stem.conv.weight'].half().double())


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_init_cfg_loads_a_backbone_alone_or_nested(kind, nested, published, reference, tmp_path):
    if kind == 'pth':
        torch.save({'net': published}, tmp_path / 'f.pth')
    else:
        safetensors = pytest.importorskip('safetensors.torch')
        safetensors.save_file(published, tmp_path / 'f.safetensors', {'arch': '1m'})
    cfg = {'type': 'EMOv2', 'arch': '1m', 'final_norm': True}
    cfg['init_cfg'] = {'type': 'Pretrained', 'checkpoint': str(tmp_path / f'f.{kind}')}
    backbone = MODELS.build(cfg)
    top = backbone
    if nested:
        top = BaseModule(init_cfg={'type': 'Kaiming', 'layer': 'Conv2d'})
        top.backbone, top.neck = backbone, nn.Conv2d(180, 4, 1)
    top.init_weights()
    assert_equal(backbone.state_dict(), reference)


def message(model, content, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_backbone_weights(model, tmp_path / 'file.pth')
    assert str(tmp_path / 'file.pth') in str(error.value)
    assert_equal(model.state_dict(), before)  # all or nothing
    return str(error.value)


@pytest.mark.parametrize('arch', ARCHS)
def test_the_arch_is_told_from_the_shapes(arch):
    weights = {
        f'stage{i + 1}.{j}.proj.conv.weight': torch.empty(channels, 1, 1, 1)
        for i, (depth, channels) in enumerate(zip(ARCHS[arch]['depths'], ARCHS[arch]['channels']))
        for j in range(depth)
    }
    assert find_arch(find_state_dict(weights), ARCHS) == arch
    assert find_arch(EMOv2(arch, out_indices=(0, 1)).state_dict(), ARCHS) == arch


def test_the_arch_of_the_file_is_suggested(published, tmp_path):
    text = message(EMOv2('5m'), published, tmp_path)
    assert "the file contains arch '1m'; set arch='1m'" in text
    assert 'stem.conv.weight (16, 3, 3, 3) for (24, 3, 3, 3)' in text
    assert 'missing: stages.0.2.' in text and '0 of 242 weights of EMOv2 were found' in text


def lacks(*names):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def has(name, tensor):
    return lambda weights: {**weights, name: tensor}


@pytest.mark.parametrize(
    ('change', 'options', 'expected'),
    [
        (
            lacks('stem.norm.running_var', 'stages.1.0.layer_scale'),
            {'final_norm': True},
            ['203 of 205 weights', '2 missing: stem.norm.running_var, stages.1.0.layer_scale'],
        ),
        (lacks('norm.weight', 'norm.bias'), {'final_norm': True}, ['2 missing: norm.weight, norm.bias']),
        (
            has('stages.0.2.project.weight', torch.ones(1)),
            {'out_indices': (0, 1)},
            ['1 unexpected: stages.0.2.project.weight'],
        ),
        (has('extra.weight', torch.ones(1)), {}, ['1 unexpected: extra.weight']),
        (has('stem.norm.bias', torch.ones(16, 1)), {}, ['stem.norm.bias (16, 1) for (16,)']),
    ],
    ids=['missing', 'no final norm', 'a deeper stage', 'unexpected', 'a dimension of 1'],
)
def test_what_does_not_fit_is_named(change, options, expected, reference, tmp_path):
    content = {'state_dict': prefixed('backbone.', change(reference))}
    text = message(EMOv2('1m', **options), content, tmp_path)
    assert all(part in text for part in expected)
    assert 'set arch=' not in text and 'another network' not in text


def test_weights_of_emo_version_1_are_recognized(published, tmp_path):
    """Its kernels are 3x3 in the first two stages; all else has the same names and shapes."""
    old = {
        k: v[..., 1:4, 1:4] if k.startswith(('stage1', 'stage2')) and v.shape[-1:] == (5,) else v
        for k, v in published.items()
    }
    text = message(EMOv2('1m'), old, tmp_path)
    assert '4 of another shape' in text and 'EMO (version 1)' in text


def test_weights_of_another_network_are_recognized(tmp_path):
    resnet = {'conv1.weight': torch.ones(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.ones(1)}
    text = message(EMOv2('5m'), resnet, tmp_path)
    assert '0 of ' in text and 'these are the weights of another network' in text
    assert '2 unexpected: conv1.weight, layer1.0.conv1.weight' in text and 'arch' not in text


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ([torch.ones(1)], 'it contains a list, not a state dict'),
        ({}, 'it contains no weights; its keys are: none'),
        ({'net': {}, 'epoch': 3}, 'it contains no weights; its keys are: net, epoch'),
    ],
)
def test_a_file_without_weights_is_named(content, expected, tmp_path):
    assert expected in message(EMOv2('1m', out_indices=(0,)), content, tmp_path)
