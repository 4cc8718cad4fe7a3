"""Evaluation: kept and drawn predictions, test-time augmentation, mixed precision."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import CONFIGS, ROOT, write_data
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor

from emo2_mm.engine.evaluation import enable_tta
from emo2_mm.engine.training import apply_options
from emo2_mm.errors import UserError

pytestmark = pytest.mark.both_stacks


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_amp_evaluates_in_bfloat16_on_a_cpu(tiny, call, scope):
    config = tiny(scope)
    call('train.py', config, '--no-validate')
    dtypes = set()

    class Watch(Hook):
        def before_test(self, runner):
            runner.model.backbone.stem.conv.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))

    call('test.py', config, 'work_dirs/tiny/epoch_1.pth', '--amp', hooks=(Watch(),))
    assert dtypes == {torch.bfloat16}


def test_amp_is_refused_where_nms_does_not_support_bfloat16(tiny, call):
    config = tiny('mmdet')
    with pytest.raises(SystemExit, match='NMS does not support bfloat16'):
        call('test.py', config, config, '--amp')
    cfg = Config.fromfile(ROOT / 'configs/det/mask-rcnn_emo2_1m.py')
    with pytest.raises(UserError, match='NMS does not support bfloat16'):
        apply_options(cfg, amp=True, auto_scale_lr=False, validate=True, resume=None)


def save_model(cfg: Config, path: Path) -> dict[str, Tensor]:
    """Save a model of random weights, and give them."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights), path)
    return weights


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.mark.parametrize('scope', CONFIGS)
def test_predictions_are_saved_and_drawn(tiny, call, tmp_path, scope):
    config = tiny(scope)
    save_model(Config.fromfile(config), tmp_path / 'model.pth')
    out = 'maps' if scope == 'mmseg' else 'all.pkl'
    call('test.py', config, 'model.pth', '--out', out, '--show-dir', 'painted')

    names = [f'{i}.png' for i in range(4)]
    if scope == 'mmseg':
        assert sorted(path.name for path in Path(out).iterdir()) == names
        for name in names:
            assert pixels(Path(out, name)).shape == (64, 64)
            assert set(np.unique(pixels(Path(out, name)))) <= {0, 1}
    else:
        kept = pickle.loads(Path(out).read_bytes())
        assert sorted(Path(image['img_path']).name for image in kept) == names
        for image in kept:
            if scope == 'mmpretrain':
                assert image['pred_score'].sum() == pytest.approx(1)
                assert image['pred_label'] == image['pred_score'].argmax()
            else:
                found = image['pred_instances']
                assert found['bboxes'].shape == (10, 4)
                assert found['bboxes'].isfinite().all()
                assert found['scores'].shape == found['labels'].shape == (10,)

    painted = sorted(Path('painted').rglob('*.png'))
    assert len(painted) == 4
    for name, path in zip(names, painted):
        assert name in path.name
        picture = pixels(path)
        if scope != 'mmpretrain':  # the truth beside the prediction
            assert picture.shape == (64, 128, 3)
            picture = picture[:, 64:]
        assert (picture != pixels(tmp_path / 'coco/images' / name)).any()


def shipped(name: str, folder: Path) -> Config:
    """A config as it is shipped, but testing on the tiny data, with branches that show."""
    cfg = Config.fromfile(ROOT / 'configs' / name)
    pytest.importorskip(cfg.default_scope)
    cfg.model.backbone.update(init_cfg=None, layer_scale_init_value=0.5)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.visualizer.name = str(folder)
    if cfg.default_scope == 'mmdet':
        data = dict(ann_file='boxes.json', data_prefix=dict(img='images'))
        cfg.test_dataloader.dataset.update(data_root=str(folder / 'coco'), **data)
        cfg.test_dataloader.dataset.metainfo = dict(classes=('dark', 'light'))
        cfg.test_evaluator.ann_file = str(folder / 'coco/boxes.json')
        cfg.model.bbox_head.num_classes = 2
        cfg.model.test_cfg.score_thr = 0.0
    else:
        data = dict(img_path='coco/images', seg_map_path='labels')
        cfg.test_dataloader.dataset.update(data_root=str(folder), data_prefix=data, img_suffix='.png')
    return cfg


class Views(Hook):
    """Keep what the backbone sees, and the weights in use."""

    def before_test(self, runner: Runner) -> None:
        self.images: list[Tensor] = []
        self.weights = {name: t.clone() for name, t in runner.model.module.state_dict().items()}
        backbone = runner.model.module.backbone
        backbone.register_forward_pre_hook(lambda module, inputs: self.images.append(inputs[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, sides',
    [
        ('det/retinanet_emo2_1m.py', [64, 32, 96]),
        ('seg/fpn_emo2_1m.py', [32, 48, 64, 80, 96, 112]),  # 0.5 to 1.75 times 64
    ],
)
def test_views_of_the_shipped_configs_are_scaled_and_mirrored(call, tmp_path, name, sides):
    write_data(tmp_path, images=1)
    cfg = shipped(name, tmp_path)
    if cfg.default_scope == 'mmdet':
        assert [step.scale for step in cfg.tta_pipeline[1].transforms[0]] == [
            (1333, 800),
            (666, 400),
            (2000, 1200),
        ]
        for step, side in zip(cfg.tta_pipeline[1].transforms[0], sides):
            step.scale = (side, side)
        cfg.test_dataloader.dataset.pipeline[1].scale = (64, 64)
    weights = save_model(cfg, tmp_path / 'model.pth')
    cfg.dump('shipped.py')
    views = Views()
    call('test.py', 'shipped.py', 'model.pth', '--tta', hooks=(views,))

    assert all(torch.equal(views.weights[key], weights[key]) for key in weights)
    assert [tuple(view.shape[2:]) for view in views.images] == [
        (side, side) for side in sides for _ in range(2)
    ]
    for view, mirrored in zip(views.images[::2], views.images[1::2]):
        assert torch.equal(view.flip(-1), mirrored)
        assert not torch.equal(view, mirrored)

    figures = [json.loads(path.read_text()) for path in Path('work_dirs/shipped').glob('*/*.json')]
    assert figures
    for figure in figures:
        assert {'coco/bbox_mAP', 'mIoU'} & set(figure)
        assert all(map(math.isfinite, figure.values()))


@pytest.mark.parametrize('scope', CONFIGS)
def test_model_of_each_library_is_wrapped_for_tta(tiny, call, tmp_path, scope):
    config = tiny(scope)
    runner = call('test.py', config, save(config, tmp_path), '--tta', '--work-dir', 'augmented')
    assert 'TTA' in type(runner.model).__name__
    used = Config.fromfile('augmented/tiny.py')
    assert 'TestTimeAug' in [step.type for step in used.test_dataloader.dataset.pipeline]


def test_tta_is_refused_for_masks():
    cfg = Config.fromfile(ROOT / 'configs/det/mask-rcnn_emo2_1m.py')
    with pytest.raises(UserError, match='cannot merge masks'):
        enable_tta(cfg)


def test_tta_is_refused_for_a_segmentor_without_its_pipeline(tiny):
    cfg = Config.fromfile(tiny('mmseg'))
    cfg.pop('tta_model')
    with pytest.raises(UserError, match='--tta needs tta_model and tta_pipeline'):
        enable_tta(cfg)


AVERAGE = """
custom_hooks = [dict(type='EMAHook', momentum=0.2, priority='ABOVE_NORMAL')]
"""
HOOK = """
custom_hooks = [dict(type='emo2_mm.engine.hooks.SwitchToDeployHook')]
"""


def save(config: Path, folder: Path) -> str:
    save_model(Config.fromfile(config), folder / 'model.pth')
    return 'model.pth'


def scores(path: str) -> Tensor:
    return torch.stack([image['pred_score'] for image in pickle.loads(Path(path).read_bytes())])


@pytest.mark.parametrize('more', ['', AVERAGE, HOOK], ids=['plain', 'averaged', 'in the config'])
def test_deployed_model_predicts_the_same(tiny, call, tmp_path, more):
    config = tiny('mmpretrain')
    call('test.py', config, save(config, tmp_path), '--out', 'plain.pkl')
    config.write_text(config.read_text() + more)
    flags = [] if more == HOOK else ['--deploy']
    runner = call('test.py', config, 'model.pth', '--out', 'deployed.pkl', *flags)
    assert runner.model.backbone.deployed
    torch.testing.assert_close(scores('deployed.pkl'), scores('plain.pkl'), rtol=1e-4, atol=1e-6)


def test_deployed_weights_need_a_deployed_backbone(tiny, call, tmp_path):
    config = tiny('mmpretrain')
    runner = call('test.py', config, save(config, tmp_path), '--deploy')
    torch.save(dict(state_dict=runner.model.state_dict()), 'deployed.pth')
    with pytest.raises(SystemExit, match='error: the weights are deployed ones'):
        call('test.py', config, 'deployed.pth')
    call('test.py', config, 'deployed.pth', '--cfg-options', 'model.backbone.deploy=True')
    with pytest.raises(SystemExit, match='error: this EMOv2 was switched to deploy'):
        call('train.py', config, '--cfg-options', 'model.backbone.deploy=True')
