"""The backbone: agreement with recordings, shapes, arguments, freezing, recomputation."""

from __future__ import annotations

from typing import Any, Callable, Iterator

import pytest
import torch
from helpers.golden import normal, relative_error
from helpers.networks import (
    CASES,
    TINY,
    assert_close,
    deployed,
    golden_model,
    logits_of,
    name_of,
    relative,
    results,
    tiny,
    visible,
)
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emo2_mm import EMOv2, cpu
from emo2_mm.layers import DropPath
from emo2_mm.weights.load import find_state_dict


@pytest.fixture
def modules_only() -> Iterator[Callable[[], None]]:
    """Call it to compute, on the CPU of the tests, what GPUs, compiled and traced networks do."""
    yield lambda: cpu.enable(False)
    cpu.enable(True)


def compiled(model: EMOv2, backend: str | None) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return torch.compile(model, backend=backend, fullgraph=True) if backend else model


TRAINED = [case for case in CASES if 'param_grad' in case]
PATHS = ('eager', 'modules', 'deployed', 'deployed modules')


@pytest.mark.parametrize('path', PATHS)
class TestGolden:
    @pytest.fixture(autouse=True)
    def _take(self, path: str, modules_only: Callable[[], None]) -> None:
        if 'modules' in path:
            modules_only()

    @pytest.mark.parametrize('case', CASES, ids=name_of)
    def test_outputs(self, case: dict[str, Any], path: str) -> None:
        model, weights = golden_model(case)
        x = normal((case['batch'], 3, *case['size']), case['seed'] + 1)
        with torch.no_grad():
            stem = model.stem(x)
            if 'deployed' in path:
                model.switch_to_deploy()
            logits = logits_of(model, weights, x)
            model.norm = None  # recorded without it
            maps = (stem, *model(x))
        assert relative_error(logits, case['logits']) < 1e-5
        for i, record in enumerate(case.get('features', {}).values()):
            assert relative_error(maps[i], record) < 1e-5

    @pytest.mark.parametrize('case', TRAINED, ids=name_of)
    def test_gradients(self, case: dict[str, Any], path: str) -> None:
        model, weights = golden_model(case)
        if 'deployed' in path:
            model.switch_to_deploy()
        weights['head.fc.bias'].requires_grad_()
        x = normal((case['batch'], 3, *case['size']), case['seed'] + 1).requires_grad_()
        logits = logits_of(model, weights, x)
        assert relative_error(logits, case['logits']) < 1e-5
        logits.backward(normal(logits.shape, case['seed'] + 2))
        assert relative_error(x.grad, case['input_grad']) < 1e-4
        if 'deployed' in path:
            return  # its parameters are others, and fixed
        own = dict(model.named_parameters(), **{'head.fc.bias': weights['head.fc.bias']})
        for published, record in case['param_grad'].items():
            (name,) = find_state_dict({published: torch.zeros(1)})
            assert relative_error(own[name].grad.reshape(record['shape']), record) < 1e-4


@pytest.mark.parametrize('path', ['eager', 'deployed'])
class TestCompiled:
    """``torch.compile`` takes the whole forward pass, as one graph."""

    @pytest.fixture(autouse=True)
    def _reset(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_small_one(self, path: str) -> None:
        torch.manual_seed(0)
        model = visible(EMOv2(dict(TINY, depths=(1, 1, 2, 1)), window_size=3)).eval()
        if path == 'deployed':
            model.switch_to_deploy()
        x = torch.rand(2, 3, 50, 40)
        with torch.no_grad():
            for a, b in zip(compiled(model, 'eager')(x), model(x)):
                assert relative(a, b) < 1e-5

    def test_export(self, path: str) -> None:
        model, x = (deployed() if path == 'deployed' else tiny().eval()), torch.rand(1, 3, 40, 33)
        with torch.no_grad():
            expected = model(x)  # and packs the weights of a deployed one
            exported = torch.export.export(model, (x,))
            found = exported.module()(x) if hasattr(exported, 'module') else exported(x)
        for a, b in zip(found, expected):
            assert relative(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiled_training(backend: str) -> None:
    torch._dynamo.reset()
    x, found = torch.rand(2, 3, 64, 70), []
    for chosen in (None, backend):
        model = tiny(final_norm=True).train()
        maps = compiled(model, chosen)(x)
        sum(m.square().mean() for m in maps).backward()
        found.append((maps, [p.grad for p in model.parameters()], list(model.buffers())))
    for ours, theirs in zip(*found):
        scale = max(t.abs().max() for t in ours).item()  # some gradients are 0, but for rounding
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * scale)


class TestFastPath:
    """What a CPU computes instead of the modules equals them; tests/cpu has changes and frozen weights."""

    @pytest.mark.parametrize(
        'kwargs',
        [
            {},
            dict(with_cp=True),
            dict(drop_path_rate=0.5),
            dict(with_cp=True, drop_path_rate=0.5, frozen_stages=0),
            dict(norm_eval=True),
            dict(frozen_stages=3),
            dict(norm_cfg=dict(type='BN', requires_grad=False)),
            dict(norm_cfg=dict(type='BN', affine=False)),
            dict(norm_cfg=dict(type='BN', momentum=None)),
            dict(norm_cfg=dict(type='BN', track_running_stats=False), with_cp=True),
        ],
        ids=str,
    )
    @pytest.mark.parametrize('mode', ['gradients', 'training'])
    def test_arguments(self, mode: str, kwargs: dict[str, Any], modules_only: Callable[[], None]) -> None:
        x = torch.rand(2, 3, 41, 50, dtype=torch.double)
        before, found = x.clone(), []
        for path in ('fast', 'modules'):
            if path == 'modules':
                modules_only()
            model = tiny(**kwargs).double().train(mode == 'training')
            found.append(results(model, x, mode, steps=2))
        assert_close(*found)
        assert torch.equal(x, before)


class TestForward:
    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    def test_memory_layout_of_the_input_changes_nothing(self, layout: torch.memory_format) -> None:
        model, x = tiny().eval(), torch.rand(2, 3, 40, 56)
        for a, b in zip(model(x.contiguous(memory_format=layout)), model(x[:, :, :, :])):
            torch.testing.assert_close(a, b)

    def test_images_of_a_batch_do_not_mix(self) -> None:
        model, x = tiny().eval(), torch.rand(3, 3, 50, 40)
        for i in range(3):
            for whole, single in zip(model(x), model(x[i : i + 1])):
                torch.testing.assert_close(whole[i], single[0], rtol=1e-4, atol=1e-5)

    def test_drop_path_drops_whole_samples_in_training_only(self) -> None:
        model = tiny(drop_path_rate=0.9)
        block = model.stages[3][1]
        assert block.drop_path.rate == pytest.approx(0.9)
        x = torch.rand(64, 4, 4, 24)
        torch.manual_seed(0)
        unchanged = [torch.equal(a, b) for a, b in zip(block.train()(x), x)]
        assert 40 <= sum(unchanged) < 64
        assert not any(torch.equal(a, b) for a, b in zip(block.eval()(x), x))

    def test_kept_samples_are_scaled_so_that_the_mean_stays(self) -> None:
        drop = DropPath(0.25).train()
        values = drop(torch.ones(64, 1, 1, 1)).unique().tolist()
        assert values == pytest.approx([0.0, 1 / 0.75])


INDICES = pytest.mark.parametrize('indices', [(0,), (3,), (0, 2), [1, 2], (0, 1, 2, 3)])


class TestArguments:
    @INDICES
    def test_feature_info(self, indices: list[int]) -> None:
        """Channels and strides are those of the maps, and the module gives what comes out."""
        model = tiny(out_indices=indices).eval()
        maps = model(torch.rand(1, 3, 64, 96))
        assert len(maps) == len(model.feature_info)
        for info, features in zip(model.feature_info, maps):
            stride = info['reduction']
            assert features.shape == (1, info['num_chs'], 64 // stride, 96 // stride)
            assert list(model.get_submodule(info['module']).parameters())

    @INDICES
    def test_out_indices(self, indices: list[int]) -> None:
        x = torch.rand(1, 3, 64, 32)
        model, whole = tiny(out_indices=indices).eval(), tiny().eval()
        whole.load_state_dict(model.state_dict(), strict=False)
        maps = model(x)
        assert len(model.stages) == indices[-1] + 1  # no stage beyond the last output
        assert len(maps) == len(indices)
        for map, i in zip(maps, indices):
            torch.testing.assert_close(map, whole(x)[i])

    @pytest.mark.parametrize(
        ('kwargs', 'message'),
        [
            (dict(arch='3m'), r"arch is '3m'; give one of \['1m', '2m', '5m', '20m', '50m'\]"),
            (dict(arch=dict(depths=(1, 1, 1, 1))), 'exactly the keys'),
            (dict(arch=dict(TINY, depths=(1, 1))), r"arch\['depths'\] is \(1, 1\)"),
            (dict(arch=dict(TINY, depths=(1, 0, 1, 1))), 'four positive values'),
            (dict(arch=dict(TINY, channels=(8, 12, 16, 24, 32))), r"arch\['channels'\] is"),
            (dict(arch=dict(TINY, expand_ratios=(2, 2, 2))), r"arch\['expand_ratios'\] is"),
            (dict(arch=dict(TINY, head_dim=0)), 'heads of 0'),
            (dict(arch=dict(TINY, head_dim=7)), 'does not divide into heads of 7'),
            (dict(arch=dict(TINY, expand_ratios=(2, 2, 2, 2.1))), 'does not divide into heads'),
            (dict(out_indices=(4,)), r'out_indices is \(4,\)'),
            (dict(out_indices=(-1,)), r'out_indices is \(-1,\)'),
            (dict(out_indices=(2, 1)), 'rising'),
            (dict(out_indices=()), r'out_indices is \(\)'),
            (dict(out_indices=None), 'out_indices is None'),
            (dict(out_indices='01'), 'out_indices is 01'),
            (dict(in_channels=0), 'in_channels is 0'),
            (dict(drop_path_rate='0.1'), "drop_path_rate is '0.1'"),
            (dict(frozen_stages=5), 'frozen_stages is 5'),
            (dict(frozen_stages=-2), 'frozen_stages is -2'),
            (dict(frozen_stages=2, out_indices=(0,)), 'builds 1 stages'),
            (dict(window_size=0), 'window_size is 0'),
            (dict(drop_path_rate=1.0), 'drop_path_rate is 1.0'),
            (dict(drop_path_rate=-0.1), 'drop_path_rate is -0.1'),
            (dict(norm_cfg=dict(type='GN')), r"norm_cfg is \{'type': 'GN'\}"),
            (dict(norm_cfg=None), 'norm_cfg is None'),
            (dict(arch=5), 'arch is 5'),
            (dict(window_size=None), 'window_size is None'),
        ],
    )
    def test_a_wrong_one_is_named(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EMOv2(**kwargs)

    def test_an_image_without_a_batch_is_named(self) -> None:
        with pytest.raises(ValueError, match=r'the shape \(3, 32, 32\); give \(B, C, H, W\)'):
            tiny()(torch.rand(3, 32, 32))

    def test_one_index_may_stand_alone(self) -> None:
        assert [tuple(m.shape) for m in tiny(out_indices=2)(torch.rand(2, 3, 32, 32))] == [(2, 16, 2, 2)]

    def test_pretrained_without_a_file_is_named(self) -> None:
        with pytest.raises(ValueError, match='name the file with checkpoint=FILE'):
            tiny(init_cfg=dict(type='Pretrained', checkpoint=None)).init_weights()

    def test_the_callers_sequences_are_not_changed(self) -> None:
        indices, arch = [1, 3], dict(TINY, depths=[1, 1, 1, 1])
        EMOv2(arch, out_indices=indices)
        assert indices == [1, 3]
        assert arch == dict(TINY, depths=[1, 1, 1, 1])

    def test_final_norm_normalises_the_last_map_only(self) -> None:
        x = torch.rand(2, 3, 64, 64)
        plain, normed = tiny().eval(), tiny(final_norm=True).eval()
        assert torch.equal(plain(x)[2], normed(x)[2])
        last = normed(x)[3]
        torch.testing.assert_close(last.mean(1), torch.zeros(2, 2, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(normed.norm(plain(x)[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), last)

    def test_norm_cfg_sets_the_class_and_keeps_eps(self) -> None:
        model = EMOv2(TINY, norm_cfg=dict(type='SyncBN', momentum=0.03, requires_grad=False))
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        assert {(type(m), m.momentum, m.eps) for m in norms} == {(nn.SyncBatchNorm, 0.03, 1e-6)}
        assert not any(p.requires_grad for m in norms for p in m.parameters())

    def test_every_norm_has_the_eps_of_the_network_and_norm_in_its_name(self) -> None:
        norms = {
            name: m
            for name, m in EMOv2(TINY, final_norm=True).named_modules()
            if isinstance(m, (_BatchNorm, nn.LayerNorm))
        }
        assert {m.eps for m in norms.values()} == {1e-6}
        assert all('norm' in name.split('.')[-1] for name in norms)

    def test_no_name_holds_head(self) -> None:
        """Recipes give parameters whose name holds `head` another learning rate."""
        assert not [name for name, _ in EMOv2('1m', final_norm=True).named_parameters() if 'head' in name]


class TestRegistry:
    @pytest.mark.parametrize('kind', ['EMOv2', 'emo2_mm.EMOv2'])
    def test_root_registry_builds_it(self, kind: str) -> None:
        assert isinstance(MODELS.build(dict(type=kind, arch='1m', out_indices=(0,))), EMOv2)

    @pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
    def test_code_bases_find_it(self, scope: str) -> None:
        registry = pytest.importorskip(f'{scope}.registry').MODELS
        assert registry.get('EMOv2') is EMOv2


class TestFreezing:
    @pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 4])
    def test_frozen_parts_from_construction_and_under_train(self, frozen_stages: int) -> None:
        model = tiny(frozen_stages=frozen_stages)
        for training in (None, False, True):
            if training is not None:
                assert model.train(training) is model
            parts = [model.stem, *model.stages]
            for i, part in enumerate(parts):
                frozen = i <= frozen_stages
                assert all(p.requires_grad != frozen for p in part.parameters())
                expected = not frozen and training is not False
                assert all(m.training == expected for m in part.modules())

    def test_frozen_statistics_do_not_move_and_others_do(self) -> None:
        model = tiny(frozen_stages=2).train()
        before = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
        model(torch.rand(2, 3, 64, 64))
        after = model.state_dict()
        moved = {k.split('.')[0] + k.split('.')[1] for k, v in before.items() if not torch.equal(v, after[k])}
        assert moved == {'stages2', 'stages3'}

    def test_norm_eval_keeps_batch_norms_in_eval_mode(self) -> None:
        model = tiny(norm_eval=True).train()
        assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
        assert model.stages[0][0].expand.training
        assert all(p.requires_grad for p in model.parameters())


class TestGradients:
    def test_every_parameter_receives_one(self) -> None:
        model = tiny(final_norm=True).train()
        torch.stack([m.square().mean() for m in model(torch.rand(2, 3, 64, 96))]).sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert without == []

    @pytest.mark.parametrize(
        'kwargs',
        [
            {},
            dict(frozen_stages=2),
            dict(drop_path_rate=0.5),
            dict(norm_cfg=dict(type='BN', track_running_stats=False)),
        ],
    )
    def test_recomputation_gives_the_same_gradients_and_statistics(self, kwargs: dict[str, Any]) -> None:
        results = []
        for with_cp in (False, True):
            model = tiny(with_cp=with_cp, **kwargs).train()
            torch.manual_seed(1)
            sum(m.square().mean() for m in model(torch.rand(2, 3, 64, 64))).backward()
            results.append(
                (
                    {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                    {n: b.clone() for n, b in model.named_buffers()},
                )
            )
        (grads, buffers), (cp_grads, cp_buffers) = results
        assert grads.keys() == cp_grads.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], cp_grads[name], msg=name)
        for name in buffers:
            assert torch.equal(buffers[name], cp_buffers[name]), name

    def test_recomputation_keeps_less_for_the_backward_pass(self) -> None:
        kept = {}
        for with_cp in (False, True):
            sizes: list[int] = []
            model = tiny(with_cp=with_cp).train()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
            ):
                model(torch.rand(2, 3, 64, 64))
            kept[with_cp] = sum(sizes)
        assert kept[True] < kept[False] / 2


@pytest.mark.parametrize('folded', [False, True], ids=['eager', 'deployed'])
def test_maps_are_contiguous(folded: bool) -> None:
    """Operators of mmcv do not look at strides: RoIAlign would read other numbers, silently."""
    model = EMOv2('1m', final_norm=True).eval()
    if folded:
        model.switch_to_deploy()
    with torch.no_grad():
        assert all(out.is_contiguous() for out in model(torch.rand(2, 3, 64, 96)))
