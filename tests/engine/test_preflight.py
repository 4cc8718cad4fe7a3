"""tools/train.py and tools/test.py: the whole way for each code base, and what they refuse."""

from __future__ import annotations

import os
import pickle

import pytest
from helpers.tiny import CLASSIFIER, DETECTOR, ROOT, SEGMENTOR, call_tool, run, write_config, write_data
from mmengine.config import Config, ConfigDict

from emo2_mm.engine import training
from emo2_mm.engine.preflight import check_data, check_pretrained
from emo2_mm.engine.training import apply_options
from emo2_mm.errors import UserError, local_rank

CASES = {
    'mmdet': (DETECTOR, 'coco/bbox_mAP: '),
    'mmpretrain': (CLASSIFIER, 'accuracy/top1: '),
    'mmseg': (SEGMENTOR, 'mIoU: '),
}


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


def check(result):
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', pytest.param('mmseg', marks=pytest.mark.slow)])
def test_train_resume_evaluate(tmp_path, scope):
    pytest.importorskip(scope)
    text, metric = CASES[scope]
    write_data(tmp_path)
    config = write_config(tmp_path, text)

    log = check(run(tmp_path, 'train.py', config))
    assert 'Epoch(train) [1][2/2]' in log
    assert metric in log
    assert (tmp_path / 'work_dirs/tiny/epoch_1.pth').is_file()

    gone = [
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=gone.pth',
    ]
    more = ['--cfg-options', 'train_cfg.max_epochs=2', *gone]  # all weights are in epoch_1.pth
    log = check(run(tmp_path, 'train.py', config, '--resume', *more))
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(train) [1]' not in log
    assert 'Epoch(train) [2][2/2]' in log

    out = 'maps' if scope == 'mmseg' else 'all.pkl'
    arguments = [config, 'work_dirs/tiny/epoch_2.pth', '--work-dir', 'two words', '--out', out]
    log = check(run(tmp_path, 'test.py', *arguments))
    assert metric in log
    assert list((tmp_path / 'two words').glob('*/*.json'))
    if scope == 'mmseg':
        assert len(list((tmp_path / out).glob('*.png'))) == 4
    else:
        assert len(pickle.loads((tmp_path / out).read_bytes())) == 4


@pytest.mark.slow
@pytest.mark.parametrize('scope', CASES)
def test_augment_and_paint(tmp_path, scope):
    pytest.importorskip(scope)
    text, metric = CASES[scope]
    write_data(tmp_path)
    config = write_config(tmp_path, text)
    check(run(tmp_path, 'train.py', config, '--no-validate'))
    test = ['test.py', config, 'work_dirs/tiny/epoch_1.pth']
    if scope == 'mmpretrain':  # whose hook cannot do both at once
        check(run(tmp_path, *test, '--tta', '--work-dir', 'augmented'))
        log = check(run(tmp_path, *test, '--show-dir', 'painted'))
    else:
        log = check(run(tmp_path, *test, '--tta', '--show-dir', 'painted', '--work-dir', 'augmented'))
    used = Config.fromfile(tmp_path / 'augmented/tiny.py')
    assert 'TTA' in used.model.type
    assert used.model.module.backbone.type == 'emo2_mm.EMOv2'
    assert 'TestTimeAug' in [step.type for step in used.test_dataloader.dataset.pipeline]
    assert metric in log
    assert len([p for p in tmp_path.rglob('*.png') if 'painted' in p.parts]) == 4


def test_no_data(tmp_path):
    """A shipped config where its data is not: one message at once, nothing made."""
    config = ROOT / 'configs/det/retinanet_emo2_5m.py'
    result = run(tmp_path, 'train.py', config)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert "train_dataloader.dataset.data_root = 'data/coco/'" in result.stderr
    assert f'no {tmp_path}/data/coco\n' in result.stderr
    assert 'https://cocodataset.org' in result.stderr
    assert 'val_evaluator.ann_file=PATH/annotations/instances_val2017.json' in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('scope', CASES)
def test_complete_data(tmp_path, scope):
    """The tiny data sets are there, so nothing is reported; without them, something is."""
    config = Config.fromfile(write_config(tmp_path, CASES[scope][0]))
    with pytest.raises(UserError, match='train_dataloader.dataset.data_'):
        check_data(config, 'train', 'val', 'test')
    write_data(tmp_path)
    check_data(config, 'train', 'val', 'test')


def test_where_data_comes_from(tmp_path, monkeypatch):
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


def test_missing_parts(missing, tmp_path):
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


def test_missing_parts_in_wrappers(missing, tmp_path):
    there = dict(data_root=str(tmp_path / 'there'), ann_file='all.json')
    gone = dict(data_root=str(tmp_path / 'gone'))
    both = dict(type='ConcatDataset', datasets=[there, dict(type='RepeatDataset', dataset=gone)])
    loaders = dict(train_dataloader=dict(dataset=dict(type='MultiImageMixDataset', dataset=both)))
    entry = 'train_dataloader.dataset.dataset.datasets.1.dataset.data_root'
    assert missing(loaders, 'train') == [entry]


def test_missing_split_and_truth(missing, tmp_path):
    data = dict(type='mmpretrain.ImageNet', data_root=str(tmp_path / 'there'), split='train')
    cfg = dict(test_dataloader=dict(dataset=data))
    assert missing(cfg, 'test') == []
    data['split'] = 'val'
    assert missing(cfg, 'test') == ['test_dataloader.dataset.data_prefix']
    data['split'] = 'train'
    cfg['test_evaluator'] = [dict(type='Accuracy'), dict(ann_file=str(tmp_path / 'gone.json'))]
    assert missing(cfg, 'test') == ['test_evaluator.1.ann_file']


@pytest.mark.parametrize(
    'data',
    [
        dict(data_root='s3://bucket/coco', ann_file='all.json'),
        dict(data_root='gone', backend_args=dict(backend='petrel')),
        dict(data_root='gone', type='CIFAR10'),
    ],
)
def test_data_elsewhere(missing, data):
    assert missing(dict(train_dataloader=dict(dataset=data)), 'train') == []


def test_data_not_elsewhere(missing):
    for data in (
        dict(data_root='gone', backend_args=dict(backend='local')),
        dict(data_root='gone', backend_args=None),
        dict(data_root='gone', type='CIFAR10', download=False),
    ):
        found = missing(dict(train_dataloader=dict(dataset=data)), 'train')
        assert found == ['train_dataloader.dataset.data_root']


@pytest.mark.parametrize('init', [{}, dict(checkpoint=None), dict(checkpoint='https://host/a.pth')], ids=str)
def test_no_pretrained_file_needed(init):
    backbone = dict(init_cfg=dict(type='Pretrained', **init) if init else None)
    check_pretrained(Config(dict(model=dict(backbone=backbone), work_dir='w')))


def test_missing_pretrained(tmp_path):
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
def test_refused(tmp_path, monkeypatch, arguments, message):
    write_data(tmp_path)
    config = write_config(tmp_path, DETECTOR.replace("['visualization']", "['other']"))
    monkeypatch.chdir(tmp_path)
    for module in ('runner', 'training', 'evaluation'):
        monkeypatch.setattr(f'emo2_mm.engine.{module}.get_device', lambda: 'cpu')
    with pytest.raises(SystemExit) as end:
        call_tool(*(a.format(config=config) for a in arguments))
    assert str(end.value).startswith('error: ')
    assert message.format(folder=tmp_path) in str(end.value)


def apply(cfg, **changes):
    apply_options(cfg, **{**dict(amp=False, auto_scale_lr=False, validate=True, resume=None), **changes})


def test_training_arguments(monkeypatch):
    monkeypatch.setattr(training, 'get_device', lambda: 'cuda')
    cfg = Config(dict(model={}, optim_wrapper=dict(type='OptimWrapper'), load_from='old.pth', val_cfg={}))
    with pytest.raises(UserError, match='auto_scale_lr.base_batch_size=N'):
        apply(cfg, auto_scale_lr=True)
    cfg.auto_scale_lr = ConfigDict(base_batch_size=16)
    apply(cfg, auto_scale_lr=True, amp=True, validate=False)
    assert cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper')
    assert cfg.val_cfg is None
    assert cfg.load_from == 'old.pth'
    apply(cfg, resume='auto')
    assert (cfg.resume, cfg.load_from) == (True, None)
    apply(cfg, resume='new.pth')
    assert (cfg.resume, cfg.load_from) == (True, 'new.pth')
    cfg.optim_wrapper.type = 'OtherWrapper'
    with pytest.raises(UserError, match="'OtherWrapper'"):
        apply(cfg, amp=True)


def test_mixed_precision_config_on_cpu(monkeypatch, capsys):
    monkeypatch.setattr(training, 'get_device', lambda: 'cpu')
    wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16', clip_grad={})
    cfg = Config(dict(model={}, optim_wrapper=wrapper))
    apply(cfg)
    assert cfg.optim_wrapper == dict(type='OptimWrapper', clip_grad={})
    assert 'full precision' in capsys.readouterr().out
    cfg.optim_wrapper.dtype = 'bfloat16'
    apply(cfg, amp=True)
    assert cfg.optim_wrapper == dict(type='emo2_mm.engine.optim_wrapper.BFloat16OptimWrapper', clip_grad={})
    assert capsys.readouterr().out == ''
    cfg.optim_wrapper = wrapper
    monkeypatch.setattr(training, 'get_device', lambda: 'cuda')
    for amp in (False, True):
        apply(cfg, amp=amp)
        assert cfg.optim_wrapper == wrapper


def test_common_arguments(tmp_path, monkeypatch):
    config = write_config(tmp_path, CLASSIFIER)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    calls = []
    monkeypatch.setattr('emo2_mm.engine.train', lambda cfg, *_: calls.append((cfg, local_rank())))

    def load(*arguments):
        call_tool('train.py', config, *arguments)
        os.environ.pop('LOCAL_RANK')
        return calls[-1][0]

    cfg = load()
    assert cfg.work_dir == 'work_dirs/tiny'
    assert cfg.launcher == 'none'
    for stage in ('train', 'val', 'test'):
        loader = cfg[f'{stage}_dataloader']
        assert loader.collate_fn == dict(type='default_collate')
        assert loader.persistent_workers is False  # a loader without workers refuses True
    cfg = load('--cfg-options', 'work_dir=a', 'train_dataloader.num_workers=2')
    assert cfg.work_dir == 'a'
    assert cfg.train_dataloader.persistent_workers is True
    assert load('--cfg-options', 'work_dir=a', '--work-dir', 'b').work_dir == 'b'
    for spelling in ('--local_rank', '--local-rank'):
        load(f'{spelling}=1')
        assert calls[-1][1] == 1
    assert 'collate_fn' not in Config.fromfile(write_config(tmp_path, DETECTOR)).train_dataloader
