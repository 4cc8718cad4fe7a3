"""Every shipped config builds, trains for a step and follows its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ROOT, SIDE, write_data
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from emo2_mm import EMOv2
from emo2_mm.config import innermost_dataset
from emo2_mm.engine.training import apply_options

CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for folder in ('cls', 'det', 'seg', 'demo')
    for path in (ROOT / 'configs' / folder).glob('*.py')
    if not path.stem.endswith('_custom')  # which test_own_data.py has
)


def load(name: str) -> Config:
    cfg = Config.fromfile(ROOT / name)
    pytest.importorskip(cfg.default_scope)
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def shrink(node: Any) -> None:
    """Make all images of a pipeline small."""
    if isinstance(node, dict):
        for key in {'scale', 'crop_size'} & set(node):
            node[key] = SIDE if isinstance(node[key], int) else (SIDE, SIDE)
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            shrink(child)


def read_tiny_data(cfg: Config, data: Path) -> None:
    """Let a config train on the tiny data set, through its own pipeline."""
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False)
    dataset = innermost_dataset(cfg.train_dataloader.dataset)
    shrink(dataset.pipeline)
    pipeline = dataset.pipeline
    if cfg.default_scope == 'mmpretrain':
        dataset.clear()
        dataset.update(type='CustomDataset', data_root=str(data), data_prefix='folders', pipeline=pipeline)
    elif cfg.default_scope == 'mmdet':
        dataset.update(
            data_root=str(data / 'coco'),
            ann_file='boxes.json',
            data_prefix=dict(img='images'),
            metainfo=dict(classes=('dark', 'light')),
        )
    else:
        dataset.update(
            data_root=str(data),
            data_prefix=dict(img_path='coco/images', seg_map_path='labels'),
            img_suffix='.png',
        )
        cfg.model.data_preprocessor.size = (SIDE, SIDE)


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_for_a_step(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    write_data(tmp_path / 'data', images=2)
    read_tiny_data(cfg, tmp_path / 'data')
    cfg.model.backbone.init_cfg = None
    if 'teacher' in cfg.model:
        from helpers.teacher import write_teacher

        cfg.model.teacher = write_teacher(tmp_path, cfg.model.head.num_classes)
        cfg.model.teacher_size = SIDE
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
    apply_options(cfg, amp=False, auto_scale_lr=False, validate=False, resume=None)
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks.checkpoint = None
    cfg.launcher, cfg.work_dir = 'none', str(tmp_path / 'work')
    cfg.experiment_name = tmp_path.name  # mmengine keeps runners by name

    runner = Runner.from_cfg(cfg)
    trained, reached = set(), set()
    for key, parameter in runner.model.named_parameters():
        if parameter.requires_grad:
            trained.add(key)
            parameter.register_hook(lambda grad, key=key: reached.add(key))
    runner.train()
    loss = runner.message_hub.get_scalar('train/loss').current()
    assert loss > 0
    assert torch.tensor(loss).isfinite()
    assert trained == reached  # several processes need no find_unused_parameters then


@pytest.mark.parametrize('name', CONFIGS)
def test_backbone_is_named_so_that_it_imports_itself(name: str) -> None:
    assert load(name).model.backbone.type == 'emo2_mm.EMOv2'


@pytest.mark.parametrize('name', [c for c in CONFIGS if '5m' not in c and '/demo/' not in c])
def test_siblings_hold_only_what_differs(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.startswith('#')]
    assert len(code) <= 10
    assert '_5m' in code[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_heads_take_the_channels_of_the_arch(name: str) -> None:
    cfg = load(name)
    channels = list(EMOv2.arch_settings[cfg.model.backbone.arch]['channels'])
    if cfg.default_scope == 'mmpretrain':
        assert cfg.model.head.in_channels == channels[-1]
    elif 'ssdlite' in name:
        assert list(cfg.model.neck.in_channels) == channels[2:]
        assert list(cfg.model.bbox_head.in_channels) == [*channels[2:], 512, 256, 256, 128]
    elif 'neck' in cfg.model:
        assert cfg.model.neck.in_channels == channels
    elif 'segformer' in name:
        assert cfg.model.decode_head.in_channels == channels
    else:
        assert cfg.model.decode_head.in_channels == channels[3]
        assert cfg.model.auxiliary_head.in_channels == channels[2]


def param_groups(cfg: Config) -> dict[str, dict[str, Any]]:
    cfg.model.backbone.init_cfg = None
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    model = build(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(g['params'][0])]: g for g in optimizer.param_groups}


def test_classification_decays_neither_one_dimensional_parameters_nor_layer_scale() -> None:
    cfg = load('configs/cls/emo2_5m.py')
    for name, group in param_groups(cfg).items():
        assert group['weight_decay'] == (0.05 if group['params'][0].ndim > 1 else 0), name
        assert group['lr'] == 3e-3
    assert cfg.custom_hooks[0].momentum == pytest.approx(1 - 0.9998)


def test_detection_decays_no_norm() -> None:
    cfg = load('configs/det/retinanet_emo2_5m.py')
    for name, group in param_groups(cfg).items():
        assert group['weight_decay'] == (0 if 'norm' in name else 0.05), name
        assert group['lr'] == 2e-4


def test_drop_path_and_window_follow_the_published_recipes() -> None:
    rates = {'1m': 0.04036, '2m': 0.05, '5m': 0.05, '20m': 0.1, '50m': 0.2}
    for name in CONFIGS:
        backbone = load(name).model.backbone
        if '/demo/' not in name:
            assert backbone.drop_path_rate == rates[backbone.arch]
            assert backbone.window_size == (8 if '_256' in name else 7 if '/cls/' in name else 10)


RECIPES = {
    # method: rate, total batch, warm-up, from, decay begins, ends, clip, frozen stages, norm_eval
    'cls/emo2': (3e-3, 1024, 20, 1e-6 / 3e-3, 20, 300, 5.0, -1, False),
    'det/retinanet': (2e-4, 16, 500, 1e-5, 6, 12, 0.1, 1, True),
    'det/mask-rcnn': (2e-4, 16, 500, 1e-5, 6, 12, 0.1, 1, True),
    'det/ssdlite': (2.4e-3, 192, 500, 1e-5, 60, 120, 0.1, -1, True),
    'seg/deeplabv3': (1.2e-4, 32, 500, 1e-5, 40000, 80000, 0.1, -1, False),
    'seg/pspnet': (1.2e-4, 32, 500, 1e-5, 40000, 80000, 0.1, -1, False),
    'seg/fpn': (1.2e-4, 32, 1500, 1e-6, 80000, 160000, None, -1, False),
    'seg/segformer': (1.2e-4, 32, 1500, 1e-6, 80000, 160000, None, -1, False),
}


@pytest.mark.parametrize('name', [c for c in CONFIGS if '/demo/' not in c])
def test_recipes_are_the_published_ones(name: str) -> None:
    cfg = load(name)
    (recipe,) = (r for method, r in RECIPES.items() if method in name)
    rate, batch, warm_up, start, begin, end, clip, frozen, norm_eval = recipe
    warming, cosine = cfg.param_scheduler
    optimizer, backbone = cfg.optim_wrapper.optimizer, cfg.model.backbone
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', rate, 0.05)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == batch
    assert (warming.type, warming.begin, warming.end) == ('LinearLR', 0, warm_up)
    assert warming.start_factor == pytest.approx(start)
    assert (cosine.type, cosine.begin, cosine.end) == ('CosineAnnealingLR', begin, end)
    assert cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters')) == end
    assert (cfg.optim_wrapper.get('clip_grad') or {}).get('max_norm') == clip
    if backbone.arch != '20m' or '/det/' not in name:  # which has no weights to keep
        assert backbone.get('frozen_stages', -1) == frozen
        assert backbone.get('norm_eval', False) == norm_eval


@pytest.mark.parametrize('name', [c for c in CONFIGS if '/cls/' in c])
def test_classifiers_train_and_test_at_the_published_sizes(name: str) -> None:
    cfg = load(name)
    (choice,) = (t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomChoice')
    assert {(crop.type, crop.scale) for (crop,) in choice.transforms} == {
        ('RandomResizedCrop', 512 if '_512' in name else 256 if '_256' in name else 224)
    }
    side = 256 if '_256' in name else 224
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        resize, crop = loader.dataset.pipeline[1:3]
        assert (resize.type, resize.edge, resize.interpolation) == ('ResizeEdge', 'short', 'bicubic')
        assert (resize.scale, crop.crop_size) == (int(side / 0.875), side)


def test_distillation_follows_the_published_recipe() -> None:
    names = [c for c in CONFIGS if c.endswith('_kd.py')]
    assert [Path(n).stem for n in names] == [f'emo2_{n}_kd' for n in ('1m', '2m', '5m_512', '5m')]
    for name in names:
        model = load(name).model
        assert model.teacher.model_name == 'tresnet_v2_l.miil_in21k_ft_in1k'
        assert model.teacher.pretrained is True
        assert (model.distill_weight, model.teacher_size) == (5.0, 224)
        assert model.get('train_window_size') == (8 if '_512' in name else None)


@pytest.mark.parametrize('method', ['fpn', 'segformer'])
def test_heads_of_long_schedules_learn_ten_times_as_fast(method: str) -> None:
    cfg = load(f'configs/seg/{method}_emo2_1m.py')
    norms = {n for n, m in build(cfg).named_modules() if 'BatchNorm' in type(m).__name__}
    assert norms
    for name, group in param_groups(cfg).items():
        is_norm = name.rpartition('.')[0] in norms or 'norm' in name
        assert group['weight_decay'] == (0 if is_norm else 0.05), name
        assert group['lr'] == pytest.approx(1.2e-3 if 'head' in name else 1.2e-4), name
