"""Deployment: folded weights compute what the trained ones did."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from helpers.checkpoints import assert_equal
from helpers.networks import TINY, relative, tiny, visible
from helpers.tiny import DETECTOR, ROOT, write_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

from emo2_mm import EMOv2, cpu


def deploy(model: EMOv2) -> EMOv2:
    """A deployed copy."""
    model = deepcopy(model)
    model.switch_to_deploy()
    return model


@torch.no_grad()
def assert_same(model: EMOv2, deployed: EMOv2, x: Tensor, limit: float = 1e-5) -> None:
    ours, theirs = deployed(x), model(x)
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    for a, b in zip(ours, theirs):
        assert relative(a, b) < limit


@contextmanager
def refused(model: EMOv2, message: str) -> Iterator[None]:
    """What happens here is an error, and leaves the model as it is: with the same weights, not deployed."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        yield
    assert not model.deployed
    assert_equal(model.state_dict(), before)


class TestOutputs:
    @pytest.mark.parametrize('size', [(1, 1), (7, 64), (33, 70), (200, 96)])
    @pytest.mark.parametrize('fast', [False, True])
    def test_any_size(self, size: tuple[int, int], fast: bool) -> None:
        model = tiny().eval()
        cpu.enable(fast)
        try:
            assert_same(model, deploy(model), torch.rand(2, 3, *size))
        finally:
            cpu.enable(True)

    @pytest.mark.parametrize(
        'kwargs',
        [
            dict(out_indices=(0,)),
            dict(out_indices=(1, 3)),
            dict(final_norm=True),
            dict(in_channels=1),
            dict(drop_path_rate=0.5),
            dict(frozen_stages=0),
            dict(frozen_stages=4),
            dict(norm_eval=True),
            dict(with_cp=True),
            dict(norm_cfg=dict(type='SyncBN')),
            dict(norm_cfg=dict(type='BN', affine=False)),
            dict(norm_cfg=dict(type='BN', eps=0.1)),
            dict(norm_cfg=dict(type='BN', requires_grad=False)),
            *(dict(window_size=size) for size in (1, 2, 5, 10)),
        ],
        ids=str,
    )
    def test_arguments(self, kwargs: dict[str, Any]) -> None:
        """In double precision, so that nothing hides behind rounding."""
        model = tiny(**kwargs).double().eval()
        x = torch.rand(2, kwargs.get('in_channels', 3), 70, 101, dtype=torch.double)
        assert_same(model, deploy(model), x, 1e-12)

    def test_statistics_of_very_different_channels(self) -> None:
        model = tiny().eval()
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.running_var.copy_(torch.logspace(-6, 2, len(norm.running_var)))
                nn.init.normal_(norm.running_mean, std=3)
        assert_same(model, deploy(model), torch.rand(1, 3, 64, 64))

    def test_each_weight_that_is_folded_counts(self) -> None:
        """Or else a fold that leaves it out would pass above."""
        model, x = tiny().eval(), torch.rand(1, 3, 64, 64)
        expected = model(x)
        for name, tensor in model.state_dict().items():
            if 'norm' in name or 'layer_scale' in name or name == 'stem.project.weight':
                if name.endswith('num_batches_tracked'):
                    continue
                before = tensor.clone()
                tensor.mul_(1.1).add_(0.1)
                assert max(relative(a, b) for a, b in zip(model(x), expected)) > 1e-4, name
                tensor.copy_(before)

    def test_gradient_of_the_image(self) -> None:
        """As explanations of a prediction ask for: outputs stay, and so does it."""
        model = tiny().double().eval()
        deployed, found = deploy(model), []
        for network in (model, deployed):
            x = torch.rand(1, 3, 40, 33, dtype=torch.double, generator=torch.Generator().manual_seed(0))
            x.requires_grad_()
            maps = network(x)
            sum(m.square().sum() for m in maps).backward()
            found.append((*maps, x.grad))
        for a, b in zip(*found):
            assert relative(a, b) < 1e-12

    @pytest.mark.parametrize(
        ('config', 'shape'),
        [(None, (2, 3, 64, 96)), ('det/retinanet_emo2_5m.py', (1, 3, 256, 320))],
        ids=['tiny', 'shipped'],
    )
    def test_within_a_detector(self, tmp_path: Path, config: str | None, shape: tuple[int, ...]) -> None:
        pytest.importorskip('mmdet')
        path = ROOT / 'configs' / config if config else write_config(tmp_path, DETECTOR)
        check_detector(Config.fromfile(path), shape)


def check_detector(config: Config, shape: tuple[int, ...]) -> None:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    config.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config.model).eval()
    visible(model.backbone)
    x = torch.rand(shape)
    with torch.no_grad():
        expected = model(x, mode='tensor')
        model.backbone.switch_to_deploy()
        outputs = model(x, mode='tensor')
    assert len(outputs) == len(expected) == 2
    for ours, theirs in zip(outputs, expected):
        for a, b in zip(ours, theirs):
            assert relative(a, b) < 1e-5
    assert not any(isinstance(m, _BatchNorm) for m in model.backbone.modules())
    with pytest.raises(RuntimeError, match='switched to deploy'):
        model.train()


class TestModes:
    def test_no_batch_norm_is_left_and_nothing_trains(self) -> None:
        model = deploy(tiny(final_norm=True).eval())
        assert not any(isinstance(m, _BatchNorm) for m in model.modules())
        assert not [name for name in model.state_dict() if 'layer_scale' in name or 'running' in name]
        assert not any(p.requires_grad for p in model.parameters())
        assert model.deployed

    def test_twice_is_once(self) -> None:
        model, x = deploy(tiny().eval()), torch.rand(1, 3, 40, 33)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        maps = model(x)
        assert model.switch_to_deploy() is None
        assert_equal(model.state_dict(), state)
        assert all(torch.equal(a, b) for a, b in zip(model(x), maps))

    def test_of_every_module_that_has_it(self) -> None:
        """Tools of deployment walk through a network and call it wherever they find it."""
        model, x = tiny().double().eval(), torch.rand(1, 3, 40, 33, dtype=torch.double)
        deployed = deepcopy(model)
        for m in list(deployed.modules()):
            if hasattr(m, 'switch_to_deploy'):
                m.switch_to_deploy()
        assert_same(model, deployed, x, 1e-12)

    @pytest.mark.parametrize('kwargs', [{}, dict(norm_eval=True), dict(frozen_stages=4)], ids=str)
    def test_training_mode_is_refused(self, kwargs: dict[str, Any]) -> None:
        model = tiny(**kwargs).train()
        with refused(model, r'call eval\(\) first'):
            model.switch_to_deploy()

    def test_it_does_not_train_afterwards(self) -> None:
        model = deploy(tiny(frozen_stages=1, norm_eval=True).eval())
        with pytest.raises(RuntimeError, match='no batch norms left to train'):
            model.train()
        with pytest.raises(RuntimeError, match='no batch norms left to train'):
            nn.Sequential(model).train()
        assert model.eval() is model
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())

    def test_norms_without_running_statistics_are_refused(self) -> None:
        model = tiny(norm_cfg=dict(type='BN', track_running_stats=False)).eval()
        with refused(model, 'track_running_stats=False'):
            model.switch_to_deploy()

    @torch.no_grad()
    def test_state_dict_of_a_deployed_one_is_loaded(self) -> None:
        model, other = deploy(tiny().eval()), EMOv2(TINY, window_size=3, deploy=True)
        x = torch.rand(1, 3, 40, 33)
        other(x)
        assert other.deployed
        assert not other.training
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x)))
        with pytest.raises(RuntimeError, match='no batch norms left to train'):
            other.train()

    @pytest.mark.parametrize('strict', [True, False])
    @pytest.mark.parametrize('wrapped', [True, False])
    def test_weights_of_the_other_kind_are_named(self, wrapped: bool, strict: bool) -> None:
        training, deployed = tiny().eval(), deploy(tiny().eval())
        if wrapped:
            training, deployed = (nn.ModuleDict(dict(backbone=m)) for m in (training, deployed))
        before = {name: t.clone() for name, t in training.state_dict().items()}
        with pytest.raises(RuntimeError, match='are deployed ones.*build it with deploy=True'):
            training.load_state_dict(deployed.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match='are those of training.*this EMOv2 is deployed'):
            deployed.load_state_dict(training.state_dict(), strict=strict)
        assert_equal(training.state_dict(), before)

    @pytest.mark.parametrize('kind', ['bare', 'checkpoint'])
    def test_mmengine_does_not_load_the_other_kind(self, kind: str, tmp_path: Path) -> None:
        """Its own loading only warns of names that do not fit."""
        state_dict = {f'backbone.{name}': t for name, t in deploy(tiny().eval()).state_dict().items()}
        file = tmp_path / 'deployed.pth'
        torch.save(dict(state_dict=state_dict) if kind == 'checkpoint' else state_dict, file)
        with pytest.raises(RuntimeError, match='build it with deploy=True'):
            load_checkpoint(nn.ModuleDict(dict(backbone=tiny())), str(file), map_location='cpu')
        model = nn.ModuleDict(dict(backbone=EMOv2(TINY, window_size=3, deploy=True)))
        load_checkpoint(model, str(file), map_location='cpu')
        assert_equal(model.state_dict(), state_dict)

    def test_pretrained(self, tmp_path: Path) -> None:
        file, source = tmp_path / 'deployed.pth', deploy(tiny().eval())
        torch.save(source.state_dict(), file)
        init_cfg = dict(type='Pretrained', checkpoint=str(file))
        model = EMOv2(TINY, window_size=3, deploy=True, init_cfg=init_cfg)
        model.init_weights()
        assert_equal(model.state_dict(), source.state_dict())
        with pytest.raises(ValueError, match='build it with deploy=True'):
            EMOv2(TINY, init_cfg=init_cfg).init_weights()
        torch.save(tiny().state_dict(), file)
        with pytest.raises(ValueError, match='this EMOv2 is deployed'):
            model.init_weights()


def replaced(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[EMOv2], None]:
    def change(model: EMOv2) -> None:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)).eval())

    return change


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


UNFOLDABLE: dict[str, Callable[[EMOv2], Any]] = {
    'stages.1.1.depthwise_norm': replaced('stages.1.1.depthwise_norm', lambda m: NormAndReLU(30)),
    'stages.2.1.depthwise_norm': replaced('stages.2.1.depthwise_norm', lambda m: nn.GroupNorm(2, 48)),
    'stages.1.1.norm': lambda m: m.stages[1][1].norm.train(),
    'stages.3.1.project': replaced('stages.3.1.project', nn.Sequential),
    'stages.1.0.expand.linear': lambda m: prune.l1_unstructured(m.stages[1][0].expand.linear, 'weight', 0.5),
    'stages.0.0.depthwise': lambda m: m.stages[0][0].depthwise.register_forward_hook(lambda *args: None),
    'stem.conv': lambda m: parametrizations.weight_norm(m.stem.conv),
    'stem.project': replaced('stem.project', lambda m: nn.Conv2d(4, 4, 1)),
    'stages.0.0': lambda m: setattr(m.stages[0][0], 'residual', True),
    'stages.0.0.norm': replaced('stages.0.0.norm', lambda m: nn.LayerNorm(4)),
}


@pytest.mark.parametrize('name', UNFOLDABLE)
def test_what_cannot_be_folded_is_refused(name: str) -> None:
    """Not dropped silently; and nothing is changed then."""
    model = tiny().eval()
    UNFOLDABLE[name](model)
    with refused(model, f'^{name} (is|has)'):
        model.switch_to_deploy()


@torch.no_grad()
def test_what_is_changed_elsewhere_stays() -> None:
    """Activations, strides, padding and biases do not matter to folding."""
    model, x = tiny().double().eval(), torch.rand(1, 3, 70, 66, dtype=torch.double)
    model.stages[1][1].depthwise_act = nn.ReLU()
    model.stages[2][1].depthwise.padding_mode = 'circular'
    model.stages[2][1].depthwise._reversed_padding_repeated_twice = [2, 2, 2, 2]
    model.stages[3][0].depthwise.stride = (1, 1)
    model.stages[3][1].project = nn.Linear(48, 24).double()
    model.stages[3][1].expand.act = nn.SiLU()
    model.stages[1][1].expand.linear.bias = None
    assert_same(model, deploy(model), x, 1e-12)
