"""What inference on a CPU does in another way: it calls no modules, takes strips, and overwrites maps."""

from __future__ import annotations

import pickle
from copy import deepcopy
from functools import partial
from typing import Any, Callable

import pytest
import torch
from emo2_mm.depthwise import DepthwiseConv2d
from emo2_mm.inference import Inference, by_strips, convolve
from emo2_mm.inplace import SiLU, add
from mmengine.model import revert_sync_batchnorm
from test_emov2 import tiny
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from emo2_mm import EMOv2, inference


def cache_of(rows: int, row_numel: int, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many rows fit the cache."""
    monkeypatch.setattr(
        inference, 'CACHE', -(-rows * row_numel * x.element_size() // torch.get_num_threads())
    )


class Spy:
    """Calls a function and notes the shapes it was given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape[:2]))
        return self.function(x)


def parts() -> dict[str, tuple[Callable[[Tensor], Tensor], int, int, int, int]]:
    """What goes by strips: the function, its channels, stride, halo, and what one pixel becomes at most."""
    model = tiny().double().eval()
    deployed = deepcopy(model)
    deployed.switch_to_deploy()
    found = {}
    run = Inference(packs=False)
    for name, m in (('', model), ('deployed ', deployed)):
        found[f'{name}stem'] = partial(run.stem, stem=m.stem), 3, 2, 4, 4
        found[f'{name}first'] = partial(run.block, block=m.stages[0][0]), 4, 2, 2, 16
        found[f'{name}second'] = partial(run.block, block=m.stages[1][1]), 12, 1, 2, 30
    return found


PARTS = parts()


class TestStrips:
    @pytest.mark.parametrize('rows', [1, 7, 45])
    @pytest.mark.parametrize('part', PARTS)
    @torch.no_grad()
    def test_equal_the_whole_map(self, part: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        function, channels, stride, halo, wide = PARTS[part]
        most = 0
        for height in range(1, 31):
            for batch in (1, 3):
                x = torch.randn(batch, height, 5, channels, dtype=torch.double)
                before, expected = x.clone(), function(x)
                cache_of(rows, 5 * wide, x, monkeypatch)
                spy = Spy(function)
                y = by_strips(spy, x, stride, halo, 5 * wide)
                torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
                assert torch.equal(x, before)
                most = max(most, len(spy.shapes))
        assert most >= 3

    @torch.no_grad()
    def test_hold_as_much_as_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spy, x = Spy(lambda x: x), torch.rand(5, 10, 2, 1)
        for rows, expected in (
            (50, [(5, 10)]),
            (49, [(4, 10), (1, 10)]),
            (20, [(2, 10), (2, 10), (1, 10)]),
            (19, [(1, 10)] * 5),
            (4, [(1, 6), (1, 8), (1, 4)] * 5),  # 4 rows and two borrowed at either side
            (1, [(1, 6), (1, 8), (1, 4)] * 5),  # fewer than 4 would borrow too much
        ):
            spy.shapes.clear()
            cache_of(rows, 2, x, monkeypatch)
            assert torch.equal(by_strips(spy, x, 1, 2, 2), x)
            assert spy.shapes == expected

    @torch.no_grad()
    def test_grow_with_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spy, x = Spy(lambda x: x), torch.rand(8, 10, 2, 1)
        monkeypatch.setattr(inference, 'CACHE', 10 * 2 * 4)
        monkeypatch.setattr('torch.get_num_threads', lambda: 4)
        by_strips(spy, x, 1, 2, 2)
        assert spy.shapes == [(4, 10)] * 2

    @pytest.mark.parametrize('size', [(61, 40), (33, 7), (1, 1), (130, 50)])
    @pytest.mark.parametrize('deployed', [False, True])
    @torch.no_grad()
    def test_of_a_whole_network(
        self, deployed: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = tiny().double().eval(), torch.rand(3, 3, *size, dtype=torch.double)
        if deployed:
            model.switch_to_deploy()
        monkeypatch.setattr(inference, 'CACHE', 1 << 40)
        whole = model(x)
        for cache in (1, 1 << 12, 1 << 15):
            monkeypatch.setattr(inference, 'CACHE', cache)
            for a, b in zip(model(x), whole):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


class TestConvolve:
    @staticmethod
    def norm(**kwargs: Any) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(6, **kwargs).double().eval()
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        return norm

    @pytest.mark.parametrize(
        'conv',
        [
            nn.Conv2d(6, 6, 3, 2, padding=1),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode='reflect'),
            DepthwiseConv2d(6, 5),
        ],
        ids=['strided', 'dilated', 'depthwise'],
    )
    @pytest.mark.parametrize('norm', ['affine', 'plain', 'none'])
    @pytest.mark.parametrize('large', [0, 1 << 40])
    @torch.no_grad()
    def test_equals_one_after_the_other(
        self, large: int, norm: str, conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        monkeypatch.setattr(inference, 'FOLDS_FROM', large)
        norm = nn.Identity() if norm == 'none' else self.norm(affine=norm == 'affine')
        x = torch.randn(2, 7, 8, 6, dtype=torch.double)
        before, y = x.clone(), convolve(x, conv.double(), norm)
        expected = nn.functional.silu(norm(conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(x, before)

    @torch.no_grad()
    def test_folds_the_norm_of_a_large_map(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Folding costs more than the norm of a small one."""
        x, folded, fold = torch.randn(2, 7, 8, 6, dtype=torch.double), [], inference.with_following_norm
        monkeypatch.setattr(inference, 'with_following_norm', lambda *a: (folded.append(1), fold(*a))[1])
        for large, calls in ((x.numel() + 1, 0), (x.numel(), 1)):
            monkeypatch.setattr(inference, 'FOLDS_FROM', large)
            convolve(x, DepthwiseConv2d(6, 5).double(), self.norm())
            assert len(folded) == calls


class Doubled(nn.Conv2d):
    """Stands where a convolution stood, and computes something else."""

    def __init__(self) -> None:
        super().__init__(30, 30, 5, padding=2, groups=30, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NormAndReLU(nn.BatchNorm2d):
    """As timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def replace(model: EMOv2, name: str, part: nn.Module) -> None:
    """Put ``part`` in the place of another, with its weights."""
    parent, _, child = name.rpartition('.')
    part.load_state_dict(model.get_submodule(name).state_dict())
    setattr(model.get_submodule(parent), name.split('.')[-1], part.double().eval())


def set_own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def dilate(block: nn.Module) -> None:
    """As segmentors do to see more at a higher resolution."""
    block.depthwise.dilation, block.depthwise.padding = (2, 2), (4, 4)


def forget_statistics(norm: nn.Module) -> None:
    norm.running_mean = norm.running_var = None


BLOCK, ATTENTION = 'stages.1.1', 'stages.2.1.expand'
# What is changed, and whether the modules have to be called for it
CHANGES: dict[str, tuple[Callable[[EMOv2], Any], bool]] = {
    'nothing': (lambda m: None, False),
    'weights': (lambda m: m.stages[2][1].project.weight.mul_(2), False),
    'a hook': (lambda m: m.stages[1][1].depthwise.register_forward_hook(lambda m, a, y: 2 * y), True),
    'a hook before': (lambda m: m.stages[3].register_forward_pre_hook(lambda m, a: None), True),
    'a forward function': (lambda m: set_own_forward(m.get_submodule(ATTENTION)), True),
    'a convolution': (
        lambda m: replace(m, f'{BLOCK}.depthwise', Doubled()),
        True,
    ),
    'an activation': (lambda m: replace(m, f'{BLOCK}.depthwise_act', nn.GELU()), True),
    'GELU': (lambda m: setattr(m.get_submodule(ATTENTION).act, 'approximate', 'tanh'), True),
    'another norm': (lambda m: replace(m, f'{BLOCK}.depthwise_norm', NormAndReLU(30)), True),
    'SyncBN': (lambda m: replace(m, f'{BLOCK}.depthwise_norm', nn.SyncBatchNorm(30, eps=1e-6)), False),
    'dilation': (lambda m: dilate(m.stages[1][1]), True),
    'the mode of a norm': (lambda m: m.stages[1][1].depthwise_norm.train(), True),
    'statistics': (lambda m: forget_statistics(m.stages[1][1].norm), True),
    'a block': (lambda m: m.stages[1].append(nn.Tanh()), True),
    'no activation': (lambda m: setattr(m.stages[2][0].expand, 'act', nn.Identity()), True),
}


class TestModulesThatAreNotCalled:
    @pytest.mark.parametrize('change', CHANGES)
    @torch.no_grad()
    def test_change(self, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It counts, whichever way it is computed."""
        model, x = tiny().double().eval(), torch.rand(2, 3, 50, 41, dtype=torch.double)
        function, needs_calls = CHANGES[change]
        before, used, infer = model(x), [], inference.infer
        monkeypatch.setattr('emo2_mm.emov2.infer', lambda *a: (used.append(1), infer(*a))[1])
        function(model)
        twin = deepcopy(model)
        maps = model(x)
        assert bool(used) != needs_calls
        monkeypatch.setattr('emo2_mm.modes.is_traced', lambda: True)
        for a, b in zip(maps, twin(x)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        same = all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(maps, before))
        assert same == (change in ('nothing', 'a hook before', 'SyncBN'))

    @torch.no_grad()
    def test_hooks_of_all_modules_are_called(self) -> None:
        model, called = tiny().eval(), []
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: called.append(m))
        try:
            model(torch.rand(1, 3, 32, 32))
        finally:
            handle.remove()
        assert model.stages[2][1].expand.qk in called

    @torch.no_grad()
    def test_of_a_subclass_with_parts_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Own(EMOv2):
            def __init__(self) -> None:
                super().__init__('1m')
                self.more = nn.Linear(2, 2)

        used, infer = [], inference.infer
        monkeypatch.setattr('emo2_mm.emov2.infer', lambda *a: (used.append(1), infer(*a))[1])
        Own().eval()(torch.rand(1, 3, 32, 32))
        assert used

    @torch.no_grad()
    def test_norms_that_mmengine_reverts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As inference of segmentors on a CPU does."""
        model, x = tiny(norm_cfg=dict(type='SyncBN')).eval(), torch.rand(1, 3, 32, 32)
        expected, used, infer = model(x), [], inference.infer
        monkeypatch.setattr('emo2_mm.emov2.infer', lambda *a: (used.append(1), infer(*a))[1])
        for a, b in zip(revert_sync_batchnorm(model)(x), expected):
            torch.testing.assert_close(a, b)
        assert used


class TestStatisticsOfTheBatch:
    """A batch norm that looks at its batch has to see all of it at once."""

    @pytest.fixture(autouse=True)
    def _small_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inference, 'CACHE', 1 << 12)

    @pytest.mark.parametrize('kwargs', [{}, dict(frozen_stages=1), dict(norm_eval=True)])
    def test_training_mode_without_gradients(self, kwargs: dict[str, Any]) -> None:
        """As precise batch norm and ``torch.optim.swa_utils.update_bn`` do."""
        x = torch.rand(2, 3, 96, 64)
        models = tiny(**kwargs).train(), tiny(**kwargs).train()
        expected = models[0](x)
        with torch.no_grad():
            maps = models[1](x)
        for a, b in zip(maps, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for (name, a), b in zip(models[1].named_buffers(), models[0].buffers()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)

    def test_norms_without_running_statistics(self) -> None:
        model, x = tiny(norm_cfg=dict(type='BN', track_running_stats=False)).eval(), torch.rand(2, 3, 96, 64)
        with torch.no_grad():
            maps = model(x)
        for a, b in zip(maps, model(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_a_block_recomputed_by_others(self) -> None:
        """A re-entrant checkpoint runs its forward pass in training mode, without gradients."""
        blocks = [tiny().train().stages[0][0] for _ in range(2)]
        x = torch.rand(2, 48, 32, 4, requires_grad=True)
        expected, y = blocks[0](x), checkpoint(blocks[1], x, use_reentrant=True)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert blocks[0].norm.num_batches_tracked == blocks[1].norm.num_batches_tracked == 1


class TestOverwriting:
    def test_silu_overwrites_what_needs_no_gradient(self) -> None:
        x = torch.randn(3, 4)
        expected = nn.functional.silu(x)
        y = SiLU()(x)
        assert y is x
        assert torch.equal(y, expected)
        x = torch.randn(3, 4, requires_grad=True)
        before = x.detach().clone()
        assert SiLU()(x) is not x
        assert torch.equal(x, before)

    @pytest.mark.parametrize(('of_x', 'of_y'), [(False, False), (True, False), (False, True), (True, True)])
    def test_add_overwrites_what_needs_no_gradient(self, of_x: bool, of_y: bool) -> None:
        x, y = torch.randn(4, requires_grad=of_x), torch.randn(4, requires_grad=of_y)
        before, other = x.detach().clone(), y.detach().clone()
        z = add(x, y)
        assert torch.equal(z, before + other)
        assert torch.equal(y, other)
        assert (z is x) == (not of_x and not of_y)
        assert z.requires_grad == (of_x or of_y)

    @pytest.mark.parametrize('cache', [1, 1 << 40])
    @pytest.mark.parametrize('plain', [False, True])
    @pytest.mark.parametrize('grad', [False, True])
    @pytest.mark.parametrize('deployed', [False, True])
    def test_images_and_returned_maps_stay(
        self, deployed: bool, grad: bool, plain: bool, cache: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inference, 'CACHE', cache)
        model = tiny(final_norm=True).eval()
        if deployed:
            model.switch_to_deploy()
        if plain:
            monkeypatch.setattr('emo2_mm.modes.is_traced', lambda: True)
        seen: list[Tensor] = []
        for stage in model.stages:
            stage[-1].register_forward_hook(lambda m, args, y: seen.append(y.clone()))
        x = torch.rand(2, 3, 40, 33).contiguous(memory_format=torch.channels_last)  # needs no copy
        before = x.clone()
        with torch.set_grad_enabled(grad):
            maps = model(x)
            first = [m.clone() for m in maps]
            again = model(x)
        assert torch.equal(x, before)
        for a, b, c in zip(maps, first, again):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        for a, b in zip(maps[:3], seen):
            assert torch.equal(a, b.permute(0, 3, 1, 2))


class TestModule:
    def test_copies_and_pickles_compute_the_same(self) -> None:
        model, x = tiny().eval(), torch.rand(1, 3, 33, 40)
        deployed = deepcopy(model)
        deployed.switch_to_deploy()
        for m in (model, deployed):
            for other in (deepcopy(m), pickle.loads(pickle.dumps(m))):
                for a, b in zip(m(x), other(x)):
                    assert torch.equal(a, b)
        assert not model.deployed

    @pytest.mark.parametrize('deployed', [False, True])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_narrow_weights(self, dtype: torch.dtype, deployed: bool) -> None:
        model, x = tiny().eval(), torch.rand(2, 3, 50, 41)
        expected = model(x)
        if deployed:
            model.switch_to_deploy()
        try:
            nn.Conv2d(1, 1, 1).to(dtype)(torch.rand(1, 1, 1, 1, dtype=dtype))
        except RuntimeError:
            pytest.skip(f'this torch does not convolve {dtype} on a CPU')
        for a, b in zip(model.to(dtype)(x.to(dtype)), expected):
            assert a.dtype == dtype
            assert ((a.float() - b).norm() / b.norm()).item() < 3e-2

    @pytest.mark.parametrize('deployed', [False, True])
    @torch.no_grad()
    def test_norms_with_more_digits_than_weights(self, deployed: bool) -> None:
        """As some keep batch norms in float32 in a narrow network."""
        model, x = tiny().eval(), torch.rand(2, 3, 50, 41)
        expected = model(x)
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        if deployed:
            model.switch_to_deploy()
        for a, b in zip(model(x.bfloat16()), expected):
            assert a.dtype == torch.bfloat16
            assert ((a.float() - b).norm() / b.norm()).item() < 3e-2

    @pytest.mark.parametrize('mode', ['training', 'gradients', 'inference'])
    def test_hooks_see_what_is_computed(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of every module, as explanations, distillation, pruning and spectral norm rely on."""
        monkeypatch.setattr(inference, 'CACHE', 1 << 12)
        model, x = tiny(final_norm=True).train(mode == 'training'), torch.rand(2, 3, 64, 64)
        seen: dict[str, list[tuple[int, ...]]] = {}
        for name, module in model.named_modules():
            if name and name.count('.') != 1 and not isinstance(module, nn.ModuleList):
                module.register_forward_hook(
                    lambda m, args, y, name=name: seen.setdefault(name, []).append(tuple(y.shape))
                )
        asked = {name for name, m in model.named_modules() if m._forward_hooks}
        asked -= {f'stages.{i}.0.drop_path' for i in range(4)}  # a block without a residual drops nothing
        with torch.set_grad_enabled(mode != 'inference'):
            model(x)
        assert sorted(asked - set(seen)) == []
        assert {name: shapes for name, shapes in seen.items() if len(shapes) > 1} == {}  # no strips
        assert seen['stages.1.1.depthwise'] == [(2, 30, 8, 8)]

    def test_a_weight_that_a_hook_computes(self) -> None:
        """Two steps of training: the hook has to compute it each time."""
        model, x = tiny().train(), torch.rand(2, 3, 32, 32)
        for block in (model.stages[0][0], model.stages[2][1]):
            prune.l1_unstructured(block.project, 'weight', 0.5)
            prune.l1_unstructured(block.depthwise, 'weight', 0.5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(m.square().mean() for m in model(x)).backward()
            optimizer.step()

    def test_outputs_of_blocks_stay_with_their_hooks(self) -> None:
        model, seen = tiny().eval(), {}
        for name in ('stages.0.0', 'stages.1.0', 'stages.1.1', 'stages.3.1'):
            model.get_submodule(name).register_forward_hook(
                lambda m, args, y, name=name: seen.__setitem__(name, (y, y.clone()))
            )
        with torch.no_grad():
            maps = model(torch.rand(2, 3, 32, 32))
        assert all(torch.equal(y, then) for y, then in seen.values())
        for i, name in ((0, 'stages.0.0'), (1, 'stages.1.1'), (3, 'stages.3.1')):
            assert torch.equal(seen[name][0].permute(0, 3, 1, 2), maps[i])

    @pytest.mark.parametrize('final_norm', [False, True])
    @pytest.mark.parametrize('size', [(1, 1), (33, 40)])
    def test_what_follows_may_train(self, size: tuple[int, int], final_norm: bool) -> None:
        """On maps of a backbone that does not: they are no inference tensors, which refuse that."""
        model = tiny(final_norm=final_norm).eval()
        with torch.no_grad():
            maps = model(torch.rand(2, 3, *size))
        head = nn.Conv2d(24, 2, 1)
        head(maps[-1]).square().sum().backward()
        assert head.weight.grad.any()
        assert not any(m.is_inference() for m in maps)
        with torch.inference_mode():
            assert all(m.is_inference() for m in model(torch.rand(2, 3, *size)))

    def test_gradients_of_a_batch_without_images(self) -> None:
        model = tiny(norm_eval=True).train()
        sum(m.sum() for m in model(torch.rand(0, 3, 32, 32))).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    def test_batches_without_images(self) -> None:
        model = tiny().eval()
        with torch.no_grad():
            assert [tuple(m.shape) for m in model(torch.rand(0, 3, 32, 32))] == [
                (0, 8, 8, 8), (0, 12, 4, 4), (0, 16, 2, 2), (0, 24, 1, 1),
            ]  # fmt: skip
