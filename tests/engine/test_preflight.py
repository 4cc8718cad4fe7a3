"""Files that a config names are checked before training and evaluation start."""

from __future__ import annotations

import pytest
from helpers.tiny import CONFIGS, DETECTOR, ROOT, call_tool, write_config, write_data
from mmengine.config import Config

from emo2_mm.engine.preflight import check_data, check_pretrained
from emo2_mm.errors import UserError


@pytest.fixture
def missing(tmp_path):
    """The entries that the message about missing data lists for a config."""

    def entries(cfg, *stages):
        try:
            check_data(Config(cfg), *stages)
        except UserError as end:
            return [line.split(' = ')[0].strip() for line in str(end).split('\n') if ' = ' in line]
        return []

    (tmp_path / 'there').mkdir()
    (tmp_path / 'there/train').mkdir()
    (tmp_path / 'there/all.json').touch()
    return entries


def test_missing_data_of_a_shipped_config_is_one_message_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call_tool('train.py', ROOT / 'configs/det/retinanet_emo2_5m.py')
    message = str(end.value)
    assert message.startswith('error: ')
    assert "train_dataloader.dataset.data_root = 'data/coco/'" in message
    assert f'no {tmp_path}/data/coco\n' in message
    assert 'https://cocodataset.org' in message
    assert 'val_evaluator.ann_file=PATH/annotations/instances_val2017.json' in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('scope', CONFIGS)
def test_existing_data_passes_and_missing_data_does_not(tmp_path, scope):
    config = Config.fromfile(write_config(tmp_path, CONFIGS[scope]))
    with pytest.raises(UserError, match='train_dataloader.dataset.data_'):
        check_data(config, 'train', 'val', 'test')
    write_data(tmp_path)
    check_data(config, 'train', 'val', 'test')


def test_the_source_of_known_datasets_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def told(root):
        cfg = dict(test_dataloader=dict(dataset=dict(data_root=root)))
        with pytest.raises(UserError) as end:
            check_data(Config(cfg), 'test')
        return [name for name in ('make demo', 'COCO', 'ImageNet', 'ADE20K') if name in str(end.value)]

    assert told('data/digits/coco') == ['make demo']
    assert told('data/coco/') == ['COCO']
    assert told('data/imagenet') == ['ImageNet']
    assert told('data/ade/ADEChallengeData2016') == ['ADE20K']
    assert told('data/mine') == []


def test_missing_files_and_folders_are_listed(missing, tmp_path):
    data = dict(data_root=str(tmp_path / 'there'), ann_file='gone.json', data_prefix=dict(img='val'))
    loaders = dict(train_dataloader=dict(dataset=data), val_dataloader=None)
    entry = 'train_dataloader.dataset'
    assert missing(loaders, 'train', 'val') == [f'{entry}.ann_file', f'{entry}.data_prefix.img']
    assert missing(loaders, 'test') == []
    data.update(ann_file='all.json', data_prefix=dict(img='train', seg=''))
    assert missing(loaders, 'train') == []
    data.update(data_prefix='val')
    assert missing(loaders, 'train') == [f'{entry}.data_prefix']
    data.update(data_root=str(tmp_path / 'gone'))
    assert missing(loaders, 'train') == [f'{entry}.data_root']


def test_missing_data_is_found_inside_wrappers(missing, tmp_path):
    there = dict(data_root=str(tmp_path / 'there'), ann_file='all.json')
    gone = dict(data_root=str(tmp_path / 'gone'))
    both = dict(type='ConcatDataset', datasets=[there, dict(type='RepeatDataset', dataset=gone)])
    loaders = dict(train_dataloader=dict(dataset=dict(type='MultiImageMixDataset', dataset=both)))
    entry = 'train_dataloader.dataset.dataset.datasets.1.dataset.data_root'
    assert missing(loaders, 'train') == [entry]


def test_missing_split_and_ground_truth_are_listed(missing, tmp_path):
    data = dict(type='mmpretrain.ImageNet', data_root=str(tmp_path / 'there'), split='train')
    cfg = dict(test_dataloader=dict(dataset=data))
    assert missing(cfg, 'test') == []
    data['split'] = 'val'
    assert missing(cfg, 'test') == ['test_dataloader.dataset.data_prefix']
    data['split'] = 'train'
    cfg['test_evaluator'] = [dict(type='Accuracy'), dict(ann_file=str(tmp_path / 'gone.json'))]
    assert missing(cfg, 'test') == ['test_evaluator.1.ann_file']


@pytest.mark.parametrize(
    ('data', 'checked'),
    [
        (dict(data_root='s3://bucket/coco', ann_file='all.json'), False),
        (dict(data_root='gone', backend_args=dict(backend='petrel')), False),
        (dict(data_root='gone', type='CIFAR10'), False),
        (dict(data_root='gone', backend_args=dict(backend='local')), True),
        (dict(data_root='gone', backend_args=None), True),
        (dict(data_root='gone', type='CIFAR10', download=False), True),
    ],
)
def test_remote_and_downloadable_data_is_not_checked(missing, data, checked):
    found = missing(dict(train_dataloader=dict(dataset=data)), 'train')
    assert found == ['train_dataloader.dataset.data_root'] * checked


@pytest.mark.parametrize('init', [{}, dict(checkpoint=None), dict(checkpoint='https://host/a.pth')], ids=str)
def test_weights_that_are_not_local_files_are_not_checked(init):
    backbone = dict(init_cfg=dict(type='Pretrained', **init) if init else None)
    check_pretrained(Config(dict(model=dict(backbone=backbone), work_dir='w')))


def test_missing_initial_weights_are_an_error_unless_a_run_resumes(tmp_path):
    init = [dict(type='Normal', layer='Conv2d'), dict(type='Pretrained', checkpoint='gone.pth')]
    cfg = Config(dict(model=dict(teachers=[dict(backbone=dict(init_cfg=init))]), work_dir=str(tmp_path)))
    for resume in (False, True):  # there is nothing yet to resume from
        cfg.resume = resume
        with pytest.raises(UserError, match='model.teachers.0.backbone.init_cfg') as end:
            check_pretrained(cfg)
        assert "'gone.pth'" in str(end.value)
    cfg.load_from = 'last.pth'
    check_pretrained(cfg)
    assert cfg.model.teachers[0].backbone.init_cfg is None


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['train.py', 'gone.py'], 'no config file gone.py; looked at {folder}/gone.py'),
        (['train.py', '{config}', '--resume', 'gone.pth'], 'no file {folder}/gone.pth'),
        (['test.py', '{config}', 'gone.pth'], 'the checkpoint is gone.pth'),
        (['test.py', '{config}', 'gone.pth', '--out', 'all.json'], 'ends in .pkl'),
        (['test.py', '{config}', '{config}', '--show'], "dict(type='DetVisualizationHook')"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_message(tmp_path, monkeypatch, on_cpu, arguments, message):
    write_data(tmp_path)
    config = write_config(tmp_path, DETECTOR.replace("['visualization']", "['other']"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call_tool(*(a.format(config=config) for a in arguments))
    assert str(end.value).startswith('error: ')
    assert message.format(folder=tmp_path) in str(end.value)
