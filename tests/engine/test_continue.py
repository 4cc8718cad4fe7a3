"""Going on from a checkpoint: --resume with another plan, load_from with other classes; options as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import CLASSIFIER, DETECTOR, write_config, write_data
from mmengine.config import Config

from emo2_mm.config import load_config, parse_options, parse_value
from emo2_mm.engine import training
from emo2_mm.engine.preflight import check_pretrained, check_save_best
from emo2_mm.errors import UserError

SCHEDULE = """
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
    dict(type='CosineAnnealingLR', eta_min=1e-5, end=EPOCHS, convert_to_iter_based=True),
    dict(type='MultiStepLR', milestones=[2], gamma=0.5, by_epoch=True),
]
train_cfg['max_epochs'] = EPOCHS
val_cfg = val_dataloader = val_evaluator = None
default_hooks['checkpoint'] = dict(type='CheckpointHook', interval=1)
"""


@pytest.fixture
def train(tmp_path: Path, call: Any) -> Any:
    """Train a tiny classifier in the test's folder; return the learning rate of each step."""
    pytest.importorskip('mmpretrain')
    write_data(tmp_path, images=8)

    def run(epochs: int, *arguments: str, work: str = 'work', more: str = '') -> list[float]:
        text = CLASSIFIER + SCHEDULE.replace('EPOCHS', str(epochs)) + more
        run.runner = call('train.py', write_config(tmp_path, text), '--work-dir', work, *arguments)
        log = Path(run.runner.log_dir, 'vis_data/scalars.json')  # none without a step
        return [json.loads(line)['lr'] for line in log.read_text().splitlines()] if log.exists() else []

    return run


def said(train: Any) -> str:
    logs = Path(train.runner.log_dir).glob('*.log')  # runs of one second share the folder
    return '\n'.join(log.read_text() for log in logs)


@pytest.mark.parametrize(
    ('options', 'per_epoch'),
    [([], 4), (['train_dataloader.batch_size=4'], 2), (['optim_wrapper.optimizer.lr=0.01'], 4)],
    ids=['longer', 'larger batches', 'another rate'],
)
def test_resumed_rates_are_those_of_a_run_planned_so(train: Any, options: list, per_epoch: int) -> None:
    train(2)
    given = ['--cfg-options', *options] if options else []
    resumed = train(4, '--resume', *given)
    assert train.runner.iter == 4 * per_epoch
    fresh = train(4, *given, work='fresh')
    assert len(fresh) == 4 * per_epoch
    assert resumed == pytest.approx(fresh[2 * per_epoch :])


def test_same_plan_is_resumed_as_it_is(train: Any) -> None:
    fresh = train(4, work='fresh')
    Path('work').mkdir()
    Path('work/last_checkpoint').write_text('fresh/epoch_2.pth')
    resumed = train(4, '--resume')
    assert resumed == pytest.approx(fresh[8:])
    assert 'another schedule' not in said(train)


def test_what_changes_is_told(train: Any) -> None:
    train(2)
    train(4, '--resume', '--cfg-options', 'optim_wrapper.optimizer.weight_decay=0.3')
    assert train.runner.optim_wrapper.param_groups[0]['weight_decay'] == 0.3
    log = said(train)
    assert '--resume: the checkpoint has another schedule' in log
    assert 'weight_decay 0.01 -> 0.3' in log
    train(4, '--resume')
    assert 'the checkpoint has 4 of 4 epochs: nothing is left to train' in said(train)


def test_other_classes_cannot_be_resumed_but_loaded(train: Any, capsys: pytest.CaptureFixture) -> None:
    train(1)
    more = "\nmodel['head']['num_classes'] = data_preprocessor['num_classes'] = 3\n"
    Path('folders/medium').mkdir()
    Path('folders/dark/0.png').rename('folders/medium/0.png')
    with pytest.raises(SystemExit, match=r'error: --resume: .*other layers or classes: head.fc'):
        train(2, '--resume', more=more)
    train(1, '--cfg-options', 'load_from=work/epoch_1.pth', work='other', more=more)
    log = said(train)
    assert 'load_from: work/epoch_1.pth lacks 0 of' in log and 'these layers are new: head.fc' in log


def test_weights_that_fit_nowhere_are_refused(train: Any) -> None:
    torch.save(dict(state_dict={'net.conv.weight': torch.zeros(3)}), 'backbone.pth')
    with pytest.raises(SystemExit, match='has none of the .* weights of the model; it has net.conv.weight'):
        train(1, '--cfg-options', 'load_from=backbone.pth')


def test_load_from_needs_no_other_weights(tmp_path: Path) -> None:
    cfg = Config(dict(model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth')))))
    with pytest.raises(UserError, match='gone.pth'):
        check_pretrained(cfg)
    cfg.load_from = 'some.pth'
    check_pretrained(cfg)
    assert cfg.model.backbone.init_cfg is None


@pytest.mark.parametrize(
    ('evaluator', 'good', 'bad'),
    [
        (dict(type='CocoMetric', metric=['bbox', 'segm']), 'coco/segm_mAP_50', 'coco/mAP'),
        (dict(type='emo2_mm.datasets.coco.CocoMetric'), 'coco/bbox_mAP', 'bbox_mAP'),
        (dict(type='IoUMetric', iou_metrics=['mIoU']), 'mIoU', 'iou'),
        (dict(type='Accuracy', topk=(1, 5)), 'accuracy/top5', 'accuracy/top3'),
    ],
)
def test_best_checkpoint_by_an_unknown_figure(evaluator: dict, good: str, bad: str) -> None:
    hooks = dict(checkpoint=dict(type='CheckpointHook', save_best=good))
    cfg = Config(dict(val_cfg=dict(type='ValLoop'), val_evaluator=evaluator, default_hooks=hooks))
    check_save_best(cfg)
    cfg.default_hooks.checkpoint.save_best = 'auto'
    check_save_best(cfg)
    cfg.default_hooks.checkpoint.save_best = bad
    with pytest.raises(UserError, match=f'save_best is .{bad}., but the evaluation gives .*{good}'):
        check_save_best(cfg)
    cfg.val_cfg = None
    check_save_best(cfg)


def test_batch_norm_of_one_value(tmp_path: Path) -> None:
    cfg = Config(dict(train_dataloader=dict(batch_size=1)))
    with pytest.raises(UserError, match='is 1: give 2 or more'), training.explained_batch_norm(cfg):
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match='other'), training.explained_batch_norm(cfg):
        raise ValueError('other')


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('data_root=My Project/own data', 'My Project/own data'),
        ('data_root=cells,2024', 'cells,2024'),
        ('data_root=2024', '2024'),
        ('data_root=1e3', '1e3'),
        ('data_root=true', 'true'),
        ("data_root='a b'", 'a b'),
        ('data_root=a=b', 'a=b'),
        ('load_from=None', None),
        ('load_from=my run/epoch_1.pth', 'my run/epoch_1.pth'),
        ('a.init_cfg.checkpoint=12', '12'),
        ('a.ann_file=[x.json, y.json]', ['x.json', 'y.json']),
        ('metainfo.classes=(red cell, white cell)', ('red cell', 'white cell')),
        ("classes=('a, b','c')", ('a, b', 'c')),
        ('lr=1e-3', 0.001),
        ('size=640,480', [640, 480]),
        ('size=(640,480)', (640, 480)),
        ('size=[(1, 2), a]', [(1, 2), 'a']),
        ('x=True', True),
        ('x=false', False),
        ('x=None', None),
        ('x=007', 7),
        ('x={"a": 1}', {'a': 1}),
        ('x=', ''),
    ],
)
def test_values_are_taken_as_typed(option: str, value: Any) -> None:
    (parsed,) = parse_options([option]).values()
    assert parsed == value and type(parsed) is type(value)


def test_values_without_blanks_are_those_of_mmengine() -> None:
    from mmengine.config import DictAction

    texts = '1 1.5 1,2 (1,2) [a,b] [(1,2),[a,b],c] true None a () [] (3)'
    for text in texts.split():
        assert parse_value(text) == DictAction._parse_iterable(text)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_cfg.max_epoch=3', 'no setting .max_epoch.; there is train_cfg.max_epochs'),
        ('model.bakbone.arch=1m', 'there is model.backbone'),
        ('optim_wraper.optimizer.lr=1', 'there is optim_wrapper'),
        ('batchsize=3', "no setting 'batchsize'"),
        ('train_cfg.max_epochs.x=3', 'train_cfg.max_epochs is 1, which has no settings'),
        ('pipeline.9.scale=3', 'is a list of 4'),
        ('train_dataloader.dataset.pipeline.x=3', 'is a list of 4'),
        ('novalue', 'takes KEY=VALUE'),
    ],
)
def test_options_that_nothing_reads(tmp_path: Path, option: str, message: str) -> None:
    config = write_config(tmp_path, DETECTOR)
    with pytest.raises(UserError, match=message):
        load_config(config, [option])


def test_variables_of_a_config_are_refused(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, DETECTOR + "\ncheckpoint = 'x'\nmodel['init_cfg'] = dict(checkpoint='x')\n"
    )
    with pytest.raises(UserError, match='set it there, such as model.init_cfg.checkpoint'):
        load_config(config, ['checkpoint=y'])


@pytest.mark.parametrize(
    'option', ['randomness.seed=0', 'model.backbone.with_cp=True', 'load_from=x', 'work_dir=a b']
)
def test_settings_may_be_new(tmp_path: Path, option: str) -> None:
    cfg = load_config(write_config(tmp_path, DETECTOR), [option])
    key, value = next(iter(parse_options([option]).items()))
    node: Any = cfg
    for part in key.split('.'):
        node = node[part]
    assert node == value


def test_no_workers(tmp_path: Path) -> None:
    text = DETECTOR + '\ntrain_dataloader.update(num_workers=2, persistent_workers=True, prefetch_factor=4)\n'
    config = write_config(tmp_path, text)
    loader = load_config(config, ['train_dataloader.num_workers=0']).train_dataloader
    assert loader.persistent_workers is False and 'prefetch_factor' not in loader
    options = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=True']
    with pytest.raises(UserError, match='persistent_workers=True needs num_workers'):
        load_config(config, options)
