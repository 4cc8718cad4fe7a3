"""Weights come from every kind of file that holds them, and nothing else comes from any file."""

from __future__ import annotations

import argparse
import http.server
import io
import os
import pickle
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import BOMBS, Call, assert_equal, logging_objects, other, prefixed
from helpers.golden import generated_state_dict, golden_cases, normal, relative_error
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from emo2_mm import EMOv2
from emo2_mm.weights.load import find_arch, find_state_dict, load_backbone_weights
from emo2_mm.weights.read import read_checkpoint

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


def dense(reference):
    return {name: tensor for name, tensor in reference.items() if not name.startswith('norm.')}


# Good files


def test_features_are_the_recorded_ones(published, tmp_path):
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


@pytest.mark.parametrize('kind', KINDS)
def test_good_kinds(kind, published, reference, tmp_path):
    path = tmp_path / 'file.pth'
    torch.save(KINDS[kind](published, reference), path)
    model = EMOv2('1m', final_norm=True)
    load_backbone_weights(model, path)
    assert_equal(model.state_dict(), reference)


def test_a_pickle_of_a_later_protocol(published, reference, tmp_path):
    torch.save({'state_dict': published}, tmp_path / 'file.pth', pickle_protocol=4)
    model = EMOv2('1m', final_norm=True)
    load_backbone_weights(model, tmp_path / 'file.pth')
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


def test_logging_objects_are_replaced(tmp_path):
    torch.save({'state_dict': {'a': torch.ones(2)}, 'hub': logging_objects()}, tmp_path / 'f.pth')
    content = read_checkpoint(tmp_path / 'f.pth')
    assert torch.equal(content['state_dict']['a'], torch.ones(2))
    hub = content['hub']
    left = [hub['log_scalars']['loss'], hub['runtime_info']['mean']]
    assert [type(value).__name__ for value in left] == ['_Dropped'] * 2
    assert [vars(value) for value in left] == [{}] * 2
    assert hub['runtime_info']['epoch'] == 1


NUMBERS = [*map(np.float64, (0.5, -2e300)), np.float32(0.1), np.int64(-5), np.uint8(200), np.bool_(True)]


@pytest.mark.parametrize('number', NUMBERS, ids=repr)
def test_numbers_of_numpy_become_plain_ones(number, tmp_path):
    torch.save({'best': number, 'a': logging_objects()}, tmp_path / 'f.pth')
    read = read_checkpoint(tmp_path / 'f.pth')['best']
    assert read == number and type(read) is type(number.item())


def test_a_number_of_other_kinds_is_dropped(tmp_path):
    torch.save({'best': np.complex64(1), 'name': np.str_('a')}, tmp_path / 'f.pth')
    assert {type(value).__name__ for value in read_checkpoint(tmp_path / 'f.pth').values()} == {'_Dropped'}


def test_milestones_are_kept(tmp_path):
    torch.save({'milestones': Counter([8, 11]), 'a': logging_objects()}, tmp_path / 'f.pth')
    assert read_checkpoint(tmp_path / 'f.pth')['milestones'] == Counter([8, 11])


@pytest.mark.parametrize('core', ['core', '_core'])  # numpy 1 and 2
def test_arrays_of_either_numpy(core, tmp_path):
    torch.save({'a': torch.ones(2), 'mean': np.ones(2), 'best': np.float64(1)}, tmp_path / 'f.pth')
    rewrite(
        tmp_path / 'f.pth',
        lambda p: p.replace(b'numpy._core.', b'numpy.core.').replace(
            b'numpy.core.', b'numpy.%s.' % core.encode()
        ),
    )
    assert torch.equal(read_checkpoint(tmp_path / 'f.pth')['a'], torch.ones(2))


def test_shared_storage_is_kept_apart_by_offset_and_stride(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({'t': base.t(), 'row': base[1], 'hub': logging_objects()}, tmp_path / 'f.pth')
    content = read_checkpoint(tmp_path / 'f.pth')
    assert torch.equal(content['t'], base.t()) and torch.equal(content['row'], base[1])


def test_safetensors(published, reference, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(published, tmp_path / 'f.safetensors', {'arch': '1m'})
    init = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'f.safetensors')}
    model = EMOv2('1m', final_norm=True, init_cfg=init)
    model.init_weights()
    assert_equal(model.state_dict(), reference)


METADATA = {
    'of this project': (
        {'arch': '1m', 'epoch': '12', 'dataset_meta': '{"classes": ["cat"]}', 'cfg': '1'},
        {'arch': '1m', 'epoch': 12, 'dataset_meta': {'classes': ['cat']}, 'cfg': '1'},
    ),
    'of another program': ({'format': 'pt', 'epoch': 'last', 'arch': '1'}, None),
    'none': (None, {}),
}


@pytest.mark.parametrize('kind', METADATA)
def test_metadata_of_safetensors(kind, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    written, expected = METADATA[kind]
    safetensors.save_file({'w': torch.ones(2)}, tmp_path / 'f.safetensors', written)
    content = read_checkpoint(tmp_path / 'f.safetensors')
    assert content.keys() == {'state_dict', 'meta'}
    assert content['meta'] == (written if expected is None else expected)
    assert_equal(content['state_dict'], {'w': torch.ones(2)})


def test_safetensors_without_its_package(monkeypatch, tmp_path):
    (tmp_path / 'f').write_bytes(b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ImportError, match=r'f is a safetensors file: `pip install safetensors` to read it'):
        read_checkpoint(tmp_path / 'f')


def test_unused_parts_are_left_out(published, reference, tmp_path):
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
def test_through_init_cfg(nested, published, reference, tmp_path):
    torch.save({'net': published}, tmp_path / 'f.pth')
    cfg = {'type': 'EMOv2', 'arch': '1m', 'final_norm': True}
    cfg['init_cfg'] = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'f.pth')}
    backbone = MODELS.build(cfg)
    top = backbone
    if nested:
        top = BaseModule(init_cfg={'type': 'Kaiming', 'layer': 'Conv2d'})
        top.backbone, top.neck = backbone, nn.Conv2d(180, 4, 1)
    top.init_weights()
    assert_equal(backbone.state_dict(), reference)


def test_init_cfg_reports_what_is_missing(published, tmp_path):
    torch.save({'net': published}, tmp_path / 'f.pth')
    cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'f.pth')}
    top = BaseModule()
    top.backbone = EMOv2('5m', init_cfg=cfg)
    with pytest.raises(ValueError, match="set arch='1m'"):
        top.init_weights()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path / 'www'; downloads go to tmp_path / 'hub'."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setenv('no_proxy', '*')
    (tmp_path / 'www').mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path / 'www'))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_download(server, tmp_path):
    for name in 'ab':
        (tmp_path / 'www' / name).mkdir()
        torch.save({'w': torch.tensor(ord(name))}, tmp_path / 'www' / name / 'latest.pth')
    assert read_checkpoint(f'{server}/a/latest.pth')['w'] == ord('a')
    assert read_checkpoint(f'{server}/b/latest.pth')['w'] == ord('b')
    (tmp_path / 'www' / 'a' / 'latest.pth').unlink()
    assert read_checkpoint(f'{server}/a/latest.pth')['w'] == ord('a')  # not loaded again
    with pytest.raises(OSError, match=r'c/latest.pth: download failed'):
        read_checkpoint(f'{server}/c/latest.pth')


# Files of another network


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


def test_another_arch(published, tmp_path):
    text = message(EMOv2('5m'), published, tmp_path)
    assert "the file contains arch '1m'; set arch='1m'" in text
    assert 'stem.conv.weight (16, 3, 3, 3) for (24, 3, 3, 3)' in text
    assert 'missing: stages.0.2.' in text and '0 of 242 weights of EMOv2 were found' in text


def test_missing_weights_are_named(reference, tmp_path):
    lost = ('stem.norm.running_var', 'stages.1.0.layer_scale')
    weights = {name: tensor for name, tensor in reference.items() if name not in lost}
    text = message(EMOv2('1m', final_norm=True), weights, tmp_path)
    assert '203 of 205 weights of EMOv2 were found' in text
    assert '2 missing: stem.norm.running_var, stages.1.0.layer_scale' in text
    assert 'arch' not in text and 'another network' not in text


def test_a_missing_final_norm(reference, tmp_path):
    text = message(EMOv2('1m', final_norm=True), dense(reference), tmp_path)
    assert '2 missing: norm.weight, norm.bias' in text


def test_a_deeper_stage_is_not_cut(reference, tmp_path):
    weights = {**reference, 'stages.0.2.project.weight': reference['stages.0.1.project.weight']}
    text = message(EMOv2('1m', out_indices=(0, 1)), weights, tmp_path)
    assert '1 unexpected: stages.0.2.project.weight' in text


def test_an_unknown_part(reference, tmp_path):
    weights = {**prefixed('backbone.', reference), 'backbone.extra.weight': torch.ones(1)}
    text = message(EMOv2('1m'), {'state_dict': weights}, tmp_path)
    assert '1 unexpected: extra.weight' in text


def test_singleton_dimensions_count_elsewhere(reference, tmp_path):
    weights = {**reference, 'stem.norm.bias': reference['stem.norm.bias'][:, None]}
    assert 'stem.norm.bias (16, 1) for (16,)' in message(EMOv2('1m'), weights, tmp_path)


def test_emo_version_1(published, tmp_path):
    """Its kernels are 3x3 in the first two stages; all else has the same names and shapes."""
    old = {
        k: v[..., 1:4, 1:4] if k.startswith(('stage1', 'stage2')) and v.shape[-1:] == (5,) else v
        for k, v in published.items()
    }
    text = message(EMOv2('1m'), old, tmp_path)
    assert '4 of another shape' in text and 'EMO (version 1)' in text


def test_another_network(tmp_path):
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
def test_no_state_dict(content, expected, tmp_path):
    assert expected in message(EMOv2('1m', out_indices=(0,)), content, tmp_path)


# Files that are something else, or damaged


def bytes_of(content, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def rewrite(path, change_pickle=lambda data: data, drop=(), cut=()):
    """Change the records of a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name.endswith('data.pkl'):
                data = change_pickle(data)
            if not name.endswith(tuple(drop)):
                archive.writestr(name, data[:4] if name.endswith(tuple(cut)) else data)


def legacy_tar(content):
    """The format of torch 0.1, as far as its reader gets."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name in ('storages', 'tensors', 'pickle', 'sys_info'):
            data = pickle.dumps(content if name in ('storages', 'pickle') else 0, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def other_zip():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


WEIGHTS = {'w': torch.arange(6.0)}
BAD_FILES = {
    'empty': (b'', 'the file is empty'),
    'truncated': (bytes_of(WEIGHTS)[:-100], 'the end of the file is missing'),
    'cut early': (bytes_of(WEIGHTS)[:300], 'the end of the file is missing'),
    'HTML': (b'\n<!DOCTYPE html><html>404</html>', 'a web page'),
    'XML': (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'a web page'),
    'Git LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'git lfs pull'),
    'cut safetensors': (b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}', 'cannot be read: SafetensorError'),
    'text': (b'no weights', "starts with b'no weights'"),
    'npz': (other_zip(), 'cannot be read'),
    'bare pickle': (pickle.dumps({'w': 1}, protocol=4), 'a bare pickle'),
    'legacy': (bytes_of(WEIGHTS, _use_new_zipfile_serialization=False), 'before 1.6'),
    'tar': (legacy_tar(0), 'old tar format'),
}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_bad_files(kind, tmp_path):
    data, expected = BAD_FILES[kind]
    path = tmp_path / 'file.pth'
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and expected in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none.pth: no such checkpoint file'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(IsADirectoryError, match='give the checkpoint file in it'):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='s3://a/b.pth: give a local path or an http'):
        read_checkpoint('s3://a/b.pth')


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.ReLU()).save(str(tmp_path / 'f.pth'))
    with pytest.raises(ValueError, match='a TorchScript archive'):
        read_checkpoint(tmp_path / 'f.pth')


def test_records_that_are_too_short_or_missing(tmp_path):
    for kwargs, expected in (
        ({'cut': ['data/0']}, 'data/0 has 4 bytes, not 24'),
        ({'drop': ['data/0']}, 'data/0'),
        ({'drop': ['data.pkl']}, 'not one of torch.save'),
    ):
        torch.save(WEIGHTS, tmp_path / 'f.pth')
        rewrite(tmp_path / 'f.pth', **kwargs)
        with pytest.raises(ValueError, match=expected):
            read_checkpoint(tmp_path / 'f.pth')


# Hostile files. Each is shown to be live: a reader that trusts it leaves a mark.


def refused(path, marker, expected):
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert expected in str(error.value)
    assert not marker.exists()
    with open(path, 'rb') as file:  # the bomb is live
        try:
            torch.load(file, map_location='cpu', weights_only=False)
        except Exception as failure:
            print(failure)  # after the mark, at best
    assert marker.exists()


@pytest.mark.parametrize('place', ['state dict', 'message hub'])
@pytest.mark.parametrize('name', BOMBS)
def test_code_is_refused(name, place, tmp_path):
    marker = tmp_path / 'marker'
    hub = logging_objects()
    if place == 'message hub':
        hub['log_scalars']['loss']._log_history = BOMBS[name](marker)
    content = {'state_dict': dict(WEIGHTS), 'message_hub': hub}
    if place == 'state dict':
        content['state_dict']['x'] = BOMBS[name](marker)
    torch.save(content, tmp_path / 'f.pth')
    refused(tmp_path / 'f.pth', marker, 'is not on the allow-list')


@pytest.mark.parametrize('form', ['legacy', 'tar'])
def test_code_in_old_formats_is_refused(form, tmp_path):
    marker = tmp_path / 'marker'
    bomb = Call(os.system, f'touch {marker}')
    if form == 'legacy':
        torch.save(bomb, tmp_path / 'f.pth', _use_new_zipfile_serialization=False)
    else:
        (tmp_path / 'f.pth').write_bytes(legacy_tar(bomb))
    refused(tmp_path / 'f.pth', marker, 'cannot be read safely')


def save_pickle(path, data):
    torch.save(WEIGHTS, path)
    rewrite(path, lambda _: data)


def text(value):
    return pickle.BINUNICODE + len(value).to_bytes(4, 'little') + value.encode()


def test_placeholders_lead_nowhere(tmp_path):
    """getattr(HistoryBuffer, 'update').__globals__ and the like: the real ones are never there."""
    get = b'c__builtin__\ngetattr\n('
    method = get + b'cmmengine.logging.history_buffer\nHistoryBuffer\n' + text('update') + b'tR'
    namespace = get + method + text('__globals__') + b'tR'
    save_pickle(tmp_path / 'f.pth', b'\x80\x02' + namespace + b'.')
    assert type(read_checkpoint(tmp_path / 'f.pth')).__name__ == '_Dropped'
    assert vars(read_checkpoint(tmp_path / 'f.pth')) == {}
    save_pickle(tmp_path / 'f.pth', b'\x80\x02' + method + b'(' + text('x') + b'tR.')
    with pytest.raises(ValueError, match='not callable'):
        read_checkpoint(tmp_path / 'f.pth')


REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
TRICKS = {
    'dotted name': (
        b'\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.',
        r'torch._utils._rebuild_tensor_v2.__globals__ is not on the allow-list',
    ),
    'change a function': (
        b'\x80\x02' + REBUILD + b'N}' + text('__defaults__') + b')s\x86b.',
        'it modifies a function',
    ),
    'change a class': (
        b'\x80\x02ccollections\nOrderedDict\nN}' + text('get') + b'Ns\x86b.',
        'missing 1 required positional argument',
    ),
    'change a placeholder': (
        b'\x80\x02cnumpy\ndtype\nN}' + text('__new__') + b'Ns\x86b.',
        'missing 1 required positional argument',
    ),
    'another opcode': (
        b'\x80\x02(' + text('true') + b'iposix\nsystem\n.',
        'posix.system is not on the allow-list',
    ),
    'extension code': (b'\x80\x02\x82\x01.', 'unregistered extension code 1'),
    'key that is not text': (
        b'\x80\x02(' + text('storage') + b'ctorch\nFloatStorage\n'
        b'ccollections\nOrderedDict\n)R' + text('cpu') + b'K\x06tQ.',
        'which is not a storage',
    ),
    'not a storage': (
        b'\x80\x02(' + text('module') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x06tQ.',
        'which is not a storage',
    ),
}


@pytest.mark.parametrize('name', TRICKS)
def test_tricks_of_the_format(name, tmp_path):
    data, expected = TRICKS[name]
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    save_pickle(tmp_path / 'f.pth', data)
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(tmp_path / 'f.pth')
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    torch.save({**WEIGHTS, 'hub': logging_objects()}, tmp_path / 'good.pth')
    assert torch.equal(read_checkpoint(tmp_path / 'good.pth')['w'], WEIGHTS['w'])
