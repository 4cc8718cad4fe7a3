"""Hooks and options of OpenMMLab, seen to do with EMOv2 what they promise."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import free_port
from helpers.tiny import CLASSIFIER, CONFIGS, ROOT, call_tool, run, write_config, write_data
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor, nn

from emo2_mm import EMOv2
from emo2_mm.engine import evaluation, training
from emo2_mm.engine.evaluation import enable_tta
from emo2_mm.engine.runner import build_runner
from emo2_mm.engine.training import apply_options
from emo2_mm.errors import UserError
from emo2_mm.weights.load import load_backbone_weights


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the main function of a tool on the CPU, in the test's folder, and give its runner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    runners = []
    for module in ('runner', 'training', 'evaluation'):
        monkeypatch.setattr(f'emo2_mm.engine.{module}.get_device', lambda: 'cpu')

    def call(tool: str, *arguments: Any, hooks: tuple[Hook, ...] = ()) -> Runner:
        def build(cfg: Config) -> Runner:
            # MMEngine keeps loggers and visualizers by name, and names runs by the second
            cfg.experiment_name = f'{tmp_path}-{len(runners)}'
            runners.append(build_runner(cfg))
            for hook in hooks:
                runners[-1].register_hook(hook, priority='LOWEST')
            return runners[-1]

        for module in (training, evaluation):
            monkeypatch.setattr(module, 'build_runner', build)
        call_tool(tool, *arguments)
        return runners[-1]

    return call


@pytest.fixture
def tiny(tmp_path):
    """Write the tiny data and a tiny config of a code base, which may gain some lines."""
    write_data(tmp_path)

    def tiny(scope: str, more: str = '') -> Path:
        pytest.importorskip(scope)
        return write_config(tmp_path, CONFIGS[scope] + more)

    return tiny


def copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Weights(Hook):
    """Keep the weights after each step and those that are evaluated."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.trained.append(copy(runner.model))

    def before_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.evaluated.append(copy(runner.model))


def test_moving_average_is_evaluated_and_saved(tiny, call, tmp_path):
    ema = """
custom_hooks = [dict(type='EMAHook', momentum=0.2, priority='ABOVE_NORMAL')]
optim_wrapper['optimizer']['lr'] = 0.05
"""
    weights = Weights()
    runner = call(
        'train.py', tiny('mmpretrain', ema), '--cfg-options', 'train_cfg.max_epochs=2', hooks=(weights,)
    )
    parameters = [name for name, _ in runner.model.named_parameters()]
    assert len(weights.trained) == 4

    mean = {name: weights.trained[0][name] for name in parameters}
    means = []
    for step in weights.trained[1:]:
        mean = {name: 0.8 * mean[name] + 0.2 * step[name] for name in parameters}
        means.append(mean)
    saved = torch.load(tmp_path / 'work_dirs/tiny/epoch_2.pth', weights_only=False)
    for name in parameters:
        torch.testing.assert_close(saved['state_dict'][name], mean[name])
        torch.testing.assert_close(weights.evaluated[-1][name], mean[name])
        torch.testing.assert_close(weights.evaluated[0][name], means[0][name])
        # the raw weights, to go on from
        assert torch.equal(saved['ema_state_dict'][f'module.{name}'], weights.trained[-1][name])
        assert torch.equal(runner.model.state_dict()[name], weights.trained[-1][name])
        assert not torch.allclose(mean[name], weights.trained[-1][name], rtol=1e-4, atol=1e-6), name

    backbone = MODELS.build(runner.cfg.model.backbone)
    load_backbone_weights(backbone, str(tmp_path / 'work_dirs/tiny/epoch_2.pth'))
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, saved['state_dict'][f'backbone.{name}'])


class Dtypes(Hook):
    """Keep the dtypes that layers compute in, and those of the gradients."""

    def before_train(self, runner: Runner) -> None:
        self.outputs: dict[str, set[torch.dtype]] = {}
        self.gradients: set[torch.dtype] = set()
        for layer in runner.model.modules():
            layer.register_forward_hook(self.keep)
        for parameter in runner.model.parameters():
            parameter.register_hook(lambda grad: self.gradients.add(grad.dtype))

    def keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer.training and isinstance(output, Tensor):
            self.outputs.setdefault(type(layer).__name__, set()).add(output.dtype)


def last_loss(runner: Runner) -> float:
    return runner.message_hub.get_scalar('train/loss').current()


@pytest.mark.parametrize('scope', CONFIGS)
def test_mixed_precision_without_a_gpu(tiny, call, scope):
    dtypes = Dtypes()
    runner = call('train.py', tiny(scope), '--amp', '--no-validate', hooks=(dtypes,))
    for layer in ('Conv2d', 'DepthwiseConv2d', 'Linear'):
        assert dtypes.outputs[layer] == {torch.bfloat16}
    assert dtypes.outputs['LayerNorm'] == {torch.float32}
    assert dtypes.gradients == {torch.float32}
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}
    assert math.isfinite(last_loss(runner))


def test_mixed_precision_learns_the_same(tiny, call):
    mixed, full = Dtypes(), Dtypes()
    loss = last_loss(call('train.py', tiny('mmpretrain'), '--amp', '--no-validate', hooks=(mixed,)))
    expected = last_loss(call('train.py', tiny('mmpretrain'), '--no-validate', hooks=(full,)))
    assert mixed.outputs['Linear'] == {torch.bfloat16}
    assert full.outputs['Linear'] == {torch.float32}
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.02)


def test_mixed_precision_goes_on(tiny, call, tmp_path):
    """Also from the config that the first run left."""
    call('train.py', tiny('mmpretrain'), '--amp', '--no-validate')
    more = ['--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=2']
    dtypes = Dtypes()
    runner = call('train.py', 'work_dirs/tiny/tiny.py', '--amp', *more, hooks=(dtypes,))
    assert (runner.epoch, runner.iter) == (2, 4)
    assert dtypes.outputs['Linear'] == {torch.bfloat16}


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_mixed_precision_in_tests(tiny, call, scope):
    config = tiny(scope)
    call('train.py', config, '--no-validate')
    dtypes = set()

    class Watch(Hook):
        def before_test(self, runner):
            runner.model.backbone.stem.conv.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))

    call('test.py', config, 'work_dirs/tiny/epoch_1.pth', '--amp', hooks=(Watch(),))
    assert dtypes == {torch.bfloat16}


def test_no_mixed_precision_where_nms_knows_no_bfloat16(tiny, call):
    config = tiny('mmdet')
    with pytest.raises(SystemExit, match='NMS does not support bfloat16'):
        call('test.py', config, config, '--amp')
    cfg = Config.fromfile(ROOT / 'configs/det/mask-rcnn_emo2_1m.py')
    with pytest.raises(UserError, match='NMS does not support bfloat16'):
        apply_options(cfg, amp=True, auto_scale_lr=False, validate=True, resume=None)


@pytest.mark.parametrize('final_norm', [True, False])
def test_depths_of_layers(final_norm):
    """The stem, 15 blocks, the rest."""
    model = EMOv2('1m', final_norm=final_norm)
    depths = {name: model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {17}
    assert {depth for depth, _ in depths.values()} == set(range(17 if final_norm else 16))
    assert depths['stem.conv.weight'] == (0, 17)
    assert depths['stages.0.0.layer_scale'] == (1, 17)
    assert depths['stages.1.0.project.weight'] == (3, 17)
    assert depths['stages.3.2.project.weight'] == (15, 17)
    assert model.get_layer_depth('backbone.stages.2.7.norm.bias', 'backbone.') == (12, 17)
    for name in ('backbone.norm.weight', 'head.fc.weight', 'neck.stages.0.0.weight'):
        assert model.get_layer_depth(name, 'backbone.') == (16, 17)
    assert EMOv2('1m', out_indices=(1,)).get_layer_depth('stages.1.1.norm.bias') == (4, 6)


def test_learning_rate_decays_by_layer(tiny):
    cfg = Config.fromfile(tiny('mmpretrain'))
    cfg.optim_wrapper.update(
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5, flat_decay_mult=0.0),
    )
    cfg.optim_wrapper.optimizer.weight_decay = 0.05
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
        model.backbone.stem.conv.bias.requires_grad_(False)
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups

    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {names[id(parameter)]: group['lr'] for group in groups for parameter in group['params']}
    assert sum(len(group['params']) for group in groups) == len(rates) == len(names)
    depths = {  # of 7: the stem, 1 + 1 + 2 + 1 blocks, the rest
        'backbone.stem.conv.weight': 0,
        'backbone.stages.0.0.layer_scale': 1,
        'backbone.stages.1.0.depthwise.weight': 2,
        'backbone.stages.2.0.expand.linear.weight': 3,
        'backbone.stages.2.1.norm.weight': 4,
        'backbone.stages.3.0.project.weight': 5,
        'backbone.norm.weight': 6,
        'head.fc.weight': 6,
    }
    assert {name: rates[name] for name in depths} == {n: 1e-3 * 0.5 ** (6 - d) for n, d in depths.items()}
    for group in groups:
        assert group['weight_decay'] == (0.05 if group['params'][0].ndim > 1 else 0)


class Rate(Hook):
    """Keep the learning rate of the first step."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.__dict__.setdefault('first', runner.optim_wrapper.get_lr()['lr'])


@pytest.mark.parametrize('flags, factor', [([], 1), (['--auto-scale-lr'], 2 / 8)], ids=['off', 'on'])
def test_learning_rate_scales_with_the_batch(tiny, call, flags, factor):
    config = tiny('mmpretrain', "auto_scale_lr['base_batch_size'] = 8")
    rate = Rate()
    call('train.py', config, '--no-validate', *flags, hooks=(rate,))
    assert set(rate.first) == {1e-3 * factor}


@pytest.mark.slow
def test_learning_rate_scales_with_the_processes(tiny, tmp_path):
    config = tiny('mmpretrain', "auto_scale_lr['base_batch_size'] = 32")
    arguments = [config, 2, '--auto-scale-lr', '--no-validate']
    result = run(tmp_path, 'dist_train.sh', *arguments, PORT=free_port())
    assert result.returncode == 0, result.stderr[-2000:]
    (scalars,) = tmp_path.glob('work_dirs/tiny/*/vis_data/scalars.json')
    step = json.loads(scalars.read_text().splitlines()[0])
    assert step['lr'] == pytest.approx(1e-3 * 2 * 2 / 32)


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
def test_predictions_are_kept_and_painted(tiny, call, tmp_path, scope):
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
        self.weights = copy(runner.model.module)
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
def test_augmented_views_are_merged(call, tmp_path, name, sides):
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
    call('test.py', 'shipped.py', 'model.pth', '--out', 'plain.pkl')
    call('test.py', 'shipped.py', 'model.pth', '--out', 'merged.pkl', '--tta', hooks=(views,))

    assert all(torch.equal(views.weights[key], weights[key]) for key in weights)
    assert [tuple(view.shape[2:]) for view in views.images] == [
        (side, side) for side in sides for _ in range(2)
    ]
    for view, mirrored in zip(views.images[::2], views.images[1::2]):
        assert torch.equal(view.flip(-1), mirrored)
        assert not torch.equal(view, mirrored)

    if cfg.default_scope == 'mmdet':
        ((plain,), (merged,)) = (
            pickle.loads(Path(f'{kind}.pkl').read_bytes()) for kind in ('plain', 'merged')
        )
        found = merged['pred_instances']
        assert len(found['scores']) == 100
        assert 0 <= found['bboxes'].min() < found['bboxes'].max() <= 64
        assert not torch.equal(found['scores'], plain['pred_instances']['scores'])
    else:
        plain, merged = pixels(Path('plain.pkl/0.png')), pixels(Path('merged.pkl/0.png'))
        assert plain.shape == merged.shape == (64, 64)
        assert (plain != merged).any()
    figures = [json.loads(path.read_text()) for path in Path('work_dirs/shipped').glob('*/*.json')]
    assert figures
    for figure in figures:
        assert {'coco/bbox_mAP', 'mIoU'} & set(figure)
        assert all(map(math.isfinite, figure.values()))


def test_masks_cannot_be_merged():
    cfg = Config.fromfile(ROOT / 'configs/det/mask-rcnn_emo2_1m.py')
    with pytest.raises(UserError, match='cannot merge masks'):
        enable_tta(cfg)


def test_augmentation_that_is_not_described(tiny):
    cfg = Config.fromfile(tiny('mmseg'))
    cfg.pop('tta_model')
    with pytest.raises(UserError, match='--tta needs tta_model and tta_pipeline'):
        enable_tta(cfg)


class Spoil(Hook):
    """Makes the weights NaN before a step, as a step at too high a rate does."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 2:
            for parameter in runner.model.parameters():
                parameter.data.fill_(math.nan)


def test_a_loss_of_nan_ends_the_run_before_it_is_averaged(call, tmp_path):
    write_data(tmp_path)
    average = "custom_hooks = [dict(type='EMAHook', momentum=0.5, priority='ABOVE_NORMAL')]\n"
    config = write_config(tmp_path, CLASSIFIER + average)
    runners = []

    class Keep(Spoil):
        def before_run(self, runner: Runner) -> None:
            runners.append(runner)

    with pytest.raises(SystemExit, match=r'error: step 3: loss is nan. The checkpoints before it are good'):
        call('train.py', config, '--cfg-options', 'train_cfg.max_epochs=3', hooks=(Keep(),))
    [averaged] = [hook.ema_model for hook in runners[0].hooks if type(hook).__name__ == 'EMAHook']
    assert all(value.isfinite().all() for value in averaged.state_dict().values())
    assert (tmp_path / 'work_dirs/tiny/epoch_1.pth').exists()
    assert not (tmp_path / 'work_dirs/tiny/epoch_2.pth').exists()
