"""Published files hold what is needed to use a model, and nothing that only its training needed."""

from __future__ import annotations

import json
import re
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import BOMBS, assert_equal, logging_objects, other, prefixed
from helpers.golden import generated_state_dict
from helpers.tiny import CONFIGS, call_tool, model_of, write_config
from mmengine.config import Config
from torch.hub import HASH_REGEX

from emo2_mm import EMOv2, __version__
from emo2_mm import publish as publication
from emo2_mm.apis import init_inferencer
from emo2_mm.weights.load import find_state_dict, load_backbone_weights, match_weights
from emo2_mm.weights.read import read_checkpoint

pytestmark = pytest.mark.both_stacks

CFG = "model = dict(type='RetinaNet')\n"


@pytest.fixture(params=['pth', 'safetensors'])
def kind(request):
    if request.param == 'safetensors':
        pytest.importorskip('safetensors')
    return request.param


@pytest.fixture(scope='module')
def weights():
    """Of a detector."""
    backbone = match_weights(find_state_dict(generated_state_dict('1m', 3)), EMOv2('1m'))
    return {**prefixed('backbone.', backbone), 'bbox_head.retina_cls.weight': torch.ones(2, 8)}


def checkpoint(weights, **meta):
    """What a training run with a moving average saves."""
    names = dict(classes=('cat', 'dog'), palette=[(1, 2, 3), (4, 5, 6)])
    known = dict(epoch=12, iter=np.int64(480), cfg=CFG, seed=3, time='20260101_130000', dataset_meta=names)
    return dict(
        meta=dict(known, experiment_name='retinanet_emo2_1m_20260101_120000', **meta),
        state_dict=weights,
        ema_state_dict={'steps': torch.tensor(480), **prefixed('module.', other(weights))},
        message_hub=logging_objects(),
        optimizer=dict(state={i: dict(exp_avg=w) for i, w in enumerate(other(weights).values())}),
        param_schedulers=[dict(last_step=12)],
    )


@pytest.fixture
def trained(weights, tmp_path):
    torch.save(checkpoint(weights), tmp_path / 'epoch_12.pth')
    return tmp_path / 'epoch_12.pth'


def publish(src, out):
    """Publish a file; returns what was written and what was said of it."""
    said = publication.publish(Path(src), Path(out))
    return Path(said.split(': ')[0]), said


PUBLISHED = dict(
    arch='1m',
    recipe='retinanet_emo2_1m',
    epoch=12,
    iter=480,
    cfg=CFG,
    dataset_meta=dict(classes=['cat', 'dog'], palette=[(1, 2, 3), (4, 5, 6)]),
    emo2_mm_version=__version__,
)


def test_weights_and_metadata_are_kept_and_nothing_else(trained, weights, kind, tmp_path):
    path, said = publish(trained, tmp_path / f'new/mask-rcnn.v2.{kind}')
    content = read_checkpoint(path)
    assert content.keys() == {'meta', 'state_dict'}
    assert content['meta'] == PUBLISHED
    assert_equal(content['state_dict'], weights)
    if kind == 'pth':
        assert torch.load(path, weights_only=True)['meta'] == PUBLISHED

    digits = sha256(path.read_bytes()).hexdigest()[:8]
    assert path == tmp_path / f'new/mask-rcnn.v2-{digits}.{kind}'
    assert HASH_REGEX.search(path.name)[1] == digits  # which torch.hub compares
    assert list((tmp_path / 'new').iterdir()) == [path]
    before, after = (file.stat().st_size for file in (trained, path))
    assert after < before / 2
    assert said == (
        f'{path}: arch 1m, recipe retinanet_emo2_1m, {len(weights)} tensors, '
        f'{after / 1e6:.1f} MB ({trained}: {before / 1e6:.1f} MB)'
    )


def test_paths_may_start_at_the_home_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path, _ = publish('~/epoch_12.pth', '~/new/a.pth')
    assert path.parent == tmp_path / 'new' and path.is_file()
    assert not (tmp_path / '~').exists()


def test_metadata_is_text_in_safetensors(trained, tmp_path):
    safetensors = pytest.importorskip('safetensors')
    with safetensors.safe_open(publish(trained, tmp_path / 'a.safetensors')[0], 'pt') as file:
        texts = file.metadata()
    names = texts.pop('dataset_meta')
    assert json.loads(names) == json.loads(json.dumps(PUBLISHED['dataset_meta']))
    expected = {key: str(value) for key, value in PUBLISHED.items() if key != 'dataset_meta'}
    assert texts == expected


def test_the_same_content_gives_the_same_bytes(trained, kind, tmp_path):
    """Also of a file that is published already."""
    first = publish(trained, tmp_path / f'a.{kind}')[0].read_bytes()
    for number in range(3):
        assert publish(trained, tmp_path / f'{number}.{kind}')[0].read_bytes() == first
    again = publish(publish(trained, tmp_path / f'step.{kind}')[0], tmp_path / f'again.{kind}')[0]
    assert again.read_bytes() == first


def test_a_backbone_is_initialized_from_a_published_file(trained, weights, kind, tmp_path):
    path = publish(trained, tmp_path / f'a.{kind}')[0]
    model = EMOv2('1m', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    expected = {name: tensor for name, tensor in weights.items() if name.startswith('backbone.')}
    assert_equal(prefixed('backbone.', model.state_dict()), expected)


def test_views_are_saved_without_their_base(kind, tmp_path):
    many = torch.arange(100_000.0).reshape(1000, 100)
    weights = {
        'a': many[1],
        'tied': many[1],
        'turned': many[:2].t(),
        'parameter': torch.nn.Parameter(many[2]),
    }
    torch.save(dict(state_dict=weights), tmp_path / 'in.pth')
    path = publish(tmp_path / 'in.pth', tmp_path / f'a.{kind}')[0]
    assert_equal(read_checkpoint(path)['state_dict'], weights)
    assert path.stat().st_size < 10_000


ABOUT = {
    'nothing': (None, {}),
    'not a dict': ([1], {}),
    'only the time': (dict(experiment_name='20260101_120000'), {}),
    'a name with a number': (dict(experiment_name='a_2_20260101_120000'), dict(recipe='a_2')),
    'arrays': (
        dict(dataset_meta=dict(classes=('a',), palette=np.ones((1, 3)))),
        dict(dataset_meta=dict(classes=['a'], palette=None)),
    ),
    'another network': (dict(epoch=None), {}),
}


@pytest.mark.parametrize('case', ABOUT)
def test_unknown_metadata_is_left_out(case, kind, tmp_path):
    meta, expected = ABOUT[case]
    torch.save(dict(meta=meta, state_dict={'w': torch.ones(2)}, hub=logging_objects()), tmp_path / 'in.pth')
    path, said = publish(tmp_path / 'in.pth', tmp_path / f'a.{kind}')
    assert read_checkpoint(path)['meta'] == dict(expected, emo2_mm_version=__version__)
    assert f': arch custom, recipe {expected.get("recipe", "unknown")}, 1 tensors, ' in said


BAD = {
    'published weights': (
        lambda: generated_state_dict('1m', 3),
        'it has no state_dict; give a checkpoint of',
    ),
    'an empty state dict': (lambda: dict(state_dict={}), 'it has no state_dict'),
    'a list': (lambda: [torch.ones(2)], 'it has no state_dict'),
    'a number in it': (
        lambda: dict(state_dict={'w': 1}),
        "'w' in its state_dict is not a tensor but 1; remove it",
    ),
    'code': (
        lambda: dict(state_dict={'w': torch.ones(2)}, meta=BOMBS['builtins.eval']('marker')),
        'is not on the allow-list',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_files_that_cannot_be_published_are_named(case, tmp_path):
    make, expected = BAD[case]
    torch.save(make(), tmp_path / 'in.pth')
    with pytest.raises(ValueError, match=f'^{re.escape(str(tmp_path))}/in.pth: ') as error:
        publish(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert expected in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


def test_errors_on_the_command_line(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'a.safetensors').write_bytes(b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}')
    cases = (
        ('none.pth', 'out.pth', 'none.pth: no such checkpoint file'),
        (trained.name, 'folder', 'folder: a folder; give a name for the file in it'),
        (trained.name, 'in.pth/out.pth', 'in.pth'),
        (trained.name, 'out.safetensors', 'out.safetensors: `pip install safetensors` to write such a file'),
        (
            'a.safetensors',
            'out.pth',
            'a.safetensors is a safetensors file: `pip install safetensors`',
        ),
    )
    (tmp_path / 'in.pth').touch()
    monkeypatch.chdir(tmp_path)
    for name in ('safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    for src, out, expected in cases:
        assert call_tool('publish_model.py', src, out) == 1
        said = capsys.readouterr()
        assert said.out == '' and said.err.startswith('error: ') and expected in said.err
    assert not list(tmp_path.glob('*out*'))


@pytest.mark.parametrize('scope', CONFIGS)
def test_class_names_reach_inference(scope, kind, tmp_path):
    """tools/infer.py, and of torch.save also the inferencers of the code bases."""
    pytest.importorskip(scope)
    cfg = Config.fromfile(write_config(tmp_path, CONFIGS[scope]))
    content = checkpoint(model_of(cfg).state_dict(), dataset_meta=dict(classes=('night', 'day')))
    torch.save(content, tmp_path / 'in.pth')
    path = str(publish(tmp_path / 'in.pth', tmp_path / f'a.{kind}')[0])
    inferencer = init_inferencer(cfg, path, 'cpu')
    classifies = scope == 'mmpretrain'
    names = inferencer.classes if classifies else inferencer.model.dataset_meta['classes']
    assert list(names) == ['night', 'day']
    if kind == 'pth' and scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(cfg, path, device='cpu')
        assert inferencer.visualizer.dataset_meta['classes'] == ['night', 'day']


class TestDeploy:
    @pytest.fixture
    def cfg(self) -> str:
        norm_cfg, init_cfg = dict(type='BN', eps=0.01), dict(type='Pretrained', checkpoint='x.pth')
        backbone = dict(type='emo2_mm.EMOv2', arch='1m', norm_cfg=norm_cfg, init_cfg=init_cfg)
        backbone.update(frozen_stages=-1, out_indices=(0, 1, 2, 3))
        return Config(dict(model=dict(type='RetinaNet', backbone=backbone))).pretty_text

    def test_folds_the_backbone_as_its_config_says(self, cfg, weights, kind, tmp_path):
        torch.save(checkpoint(weights, cfg=cfg), tmp_path / 'epoch_12.pth')
        said = publication.publish(tmp_path / 'epoch_12.pth', tmp_path / f'det.{kind}', deploy=True)
        path = Path(said.split(': ')[0])
        assert 'arch 1m, recipe retinanet_emo2_1m, deployed' in said
        content = read_checkpoint(path)
        assert content['meta']['deployed'] in (True, 'true')
        state_dict = content['state_dict']
        assert torch.equal(state_dict['bbox_head.retina_cls.weight'], torch.ones(2, 8))

        x, norm_cfg = torch.rand(1, 3, 64, 64), dict(type='BN', eps=0.01)
        deployed, trained = EMOv2('1m', deploy=True), EMOv2('1m', norm_cfg=norm_cfg).eval()
        load_backbone_weights(deployed, path)
        load_backbone_weights(trained, tmp_path / 'epoch_12.pth')
        with torch.no_grad():
            for a, b in zip(deployed(x), trained(x)):
                assert ((a - b).norm() / b.norm()).item() < 1e-5
        with pytest.raises(ValueError, match='build it with deploy=True'):
            load_backbone_weights(trained, path)

        again = publication.publish(path, tmp_path / f'again.{kind}')
        assert ', deployed' in again  # and the metadata still say so
        with pytest.raises(ValueError, match='deployed already; leave out --deploy'):
            publication.publish(path, tmp_path / f'again.{kind}', deploy=True)

    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            ("model = dict(type='RetinaNet')", 'no model.backbone'),
            ("model = dict(backbone=dict(type='ResNet', depth=50))", 'its backbone is ResNet'),
            ("model = dict(backbone=dict(type='EMOv2', depth=50))", "unexpected keyword argument 'depth'"),
            ("model = dict(backbone=dict(type='EMOv2', arch='2m'))", "the file contains arch '1m'"),
            ("model = dict(backbone=__import__('os').system('exit 1'))", 'malformed node'),
            ('model = dict(', 'is no Python'),
            (None, 'no config in its metadata'),
        ],
    )
    def test_a_config_that_does_not_fit(self, text, message, weights, tmp_path):
        torch.save(checkpoint(weights, cfg=text), tmp_path / 'epoch_12.pth')
        with pytest.raises(ValueError, match=message):
            publication.publish(tmp_path / 'epoch_12.pth', tmp_path / 'det.pth', deploy=True)
        assert [path.name for path in tmp_path.iterdir()] == ['epoch_12.pth']

    def test_option_of_the_tool(self, cfg, weights, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save(checkpoint(weights, cfg=cfg), 'epoch_12.pth')
        call_tool('publish_model.py', 'epoch_12.pth', 'det.pth', '--deploy')
        assert ', deployed' in capsys.readouterr().out
