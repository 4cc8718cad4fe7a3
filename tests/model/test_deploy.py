"""Deployment: folded weights compute what the trained ones did."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from emo2_mm.deploy import fold_following_norm, fold_preceding_norm, scale_and_shift
from mmengine.config import Config
from mmengine.registry import DefaultScope
from test_emov2 import TINY, relative, tiny, visible
from helpers.tiny import DETECTOR, ROOT, write_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emo2_mm import EMOv2


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


class TestOutputs:
    @pytest.mark.parametrize('size', [(1, 1), (7, 64), (33, 70), (200, 96)])
    @pytest.mark.parametrize('plain', [False, True])
    def test_any_size(self, size: tuple[int, int], plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if plain:
            monkeypatch.setattr('emo2_mm.modes.is_traced', lambda: True)
        model = tiny().eval()
        assert_same(model, deploy(model), torch.rand(2, 3, *size))

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
        ],
        ids=str,
    )
    def test_arguments(self, kwargs: dict[str, Any]) -> None:
        """In double precision, so that nothing hides behind rounding."""
        model = tiny(**kwargs).double().eval()
        x = torch.rand(2, kwargs.get('in_channels', 3), 40, 51, dtype=torch.double)
        assert_same(model, deploy(model), x, 1e-12)

    @pytest.mark.parametrize('window', [1, 2, 5, 10])
    def test_window_sizes(self, window: int) -> None:
        model = visible(EMOv2(TINY, window_size=window)).double().eval()
        assert_same(model, deploy(model), torch.rand(1, 3, 70, 101, dtype=torch.double), 1e-12)

    @pytest.mark.parametrize('arch', EMOv2.arch_settings)
    def test_archs(self, arch: str) -> None:
        torch.manual_seed(0)
        model = visible(EMOv2(arch)).eval()
        assert_same(model, deploy(model), torch.rand(1, 3, 64, 96))

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

    def test_within_a_detector(self, tmp_path: Path) -> None:
        pytest.importorskip('mmdet')
        config = Config.fromfile(write_config(tmp_path, DETECTOR))
        check_detector(config, (2, 3, 64, 96))

    def test_within_a_detector_of_the_configs(self) -> None:
        pytest.importorskip('mmdet')
        check_detector(Config.fromfile(ROOT / 'configs/det/retinanet_emo2_5m.py'), (1, 3, 256, 320))


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
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
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
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r'call eval\(\) first'):
            model.switch_to_deploy()
        assert not model.deployed
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

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
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(RuntimeError, match='track_running_stats=False'):
            model.switch_to_deploy()
        assert not model.deployed
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_weights_pass_from_one_to_another(self) -> None:
        model, other = deploy(tiny().eval()), deploy(tiny(seed=1).eval())
        x = torch.rand(1, 3, 40, 33)
        assert not torch.equal(model(x)[0], other(x)[0])
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x)))

    def test_trained_weights_do_not_fit(self) -> None:
        with pytest.raises(RuntimeError, match='depthwise.bias'):
            deploy(tiny().eval()).load_state_dict(tiny().state_dict())


class TestFolding:
    @staticmethod
    def norm(**kwargs: Any) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(6, **kwargs)
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        return norm.double().eval()

    @pytest.mark.parametrize('affine', [True, False])
    def test_scale_and_shift(self, affine: bool) -> None:
        torch.manual_seed(0)
        norm, x = self.norm(affine=affine, eps=0.01), torch.randn(2, 6, 3, 3, dtype=torch.double)
        scale, shift = scale_and_shift(norm)
        y = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        torch.testing.assert_close(y, norm(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize('bias', [True, False])
    @pytest.mark.parametrize('groups', [1, 6])
    def test_norm_behind_a_convolution(self, groups: int, bias: bool) -> None:
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(6, 6, 3, groups=groups, bias=bias).double(), self.norm()
        x = torch.randn(2, 6, 5, 5, dtype=torch.double)
        expected = norm(conv(x))
        fold_following_norm(conv, norm)
        torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)

    def test_norm_in_front_of_a_linear_layer(self) -> None:
        torch.manual_seed(0)
        linear, norm = nn.Linear(6, 4).double(), self.norm()
        x = torch.randn(2, 6, 5, 5, dtype=torch.double)
        expected = linear(norm(x).permute(0, 2, 3, 1))
        fold_preceding_norm(norm, linear)
        torch.testing.assert_close(linear(x.permute(0, 2, 3, 1)), expected, rtol=1e-12, atol=1e-12)
