"""Inference on a CPU: strips of rows, and operations in place."""

from __future__ import annotations

import pickle
import re
from copy import deepcopy
from functools import partial
from typing import Any, Callable, Iterator

import pytest
import torch
from helpers.networks import deployed, tiny
from torch import Tensor, nn
from torch.nn.utils import prune

from emo2_mm import EMOv2, cpu
from emo2_mm.cpu import inference, row_strips
from emo2_mm.cpu.row_strips import by_strips

pytestmark = pytest.mark.both_stacks


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    yield
    cpu.enable(True)


def cache_of(rows: int, row_numel: int, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many rows fit the cache."""
    bytes_of_all = rows * row_numel * x.element_size()
    monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', -(-bytes_of_all // torch.get_num_threads()))


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
    found = {}
    for name, m in (('', tiny().double().eval()), ('deployed ', deployed().double())):
        found[f'{name}stem'] = partial(inference._stem, m.stem), 3, 2, 4, 4
        found[f'{name}first'] = partial(inference._block, m.stages[0][0]), 4, 2, 2, 16
        found[f'{name}second'] = partial(inference._block, m.stages[1][1]), 12, 1, 2, 30
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
        monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', 10 * 2 * 4)
        monkeypatch.setattr('torch.get_num_threads', lambda: 4)
        by_strips(spy, x, 1, 2, 2)
        assert spy.shapes == [(4, 10)] * 2

    @pytest.mark.parametrize('size', [(61, 40), (33, 7), (1, 1), (130, 50)])
    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    @torch.no_grad()
    def test_of_a_whole_network(
        self, build: Callable[[], EMOv2], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = build().double().eval(), torch.rand(3, 3, *size, dtype=torch.double)
        monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', 1 << 40)
        whole = model(x)
        for cache in (1, 1 << 12, 1 << 15):
            monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', cache)
            for a, b in zip(model(x), whole):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


class TestStatisticsOfTheBatch:
    """A batch norm that looks at its batch has to see all of it at once."""

    @pytest.fixture(autouse=True)
    def _small_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', 1 << 12)

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


class TestOverwriting:
    @pytest.mark.parametrize('cache', [1, 1 << 40])
    @pytest.mark.parametrize('fast', [False, True])
    @pytest.mark.parametrize('grad', [False, True])
    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    def test_images_and_returned_maps_stay(
        self,
        build: Callable[..., EMOv2],
        grad: bool,
        fast: bool,
        cache: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', cache)
        model = build(final_norm=True).eval()
        cpu.enable(fast)
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
        x = torch.rand(1, 3, 33, 40)
        for m in (tiny().eval(), deployed()):
            m(x)
            for other in (deepcopy(m), pickle.loads(pickle.dumps(m))):
                assert all(torch.equal(a, b) for a, b in zip(m(x), other(x)))

    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_narrow_weights(self, dtype: torch.dtype, build: Callable[[], EMOv2]) -> None:
        model, x = build().eval(), torch.rand(2, 3, 50, 41)
        expected = model(x)
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

    @pytest.mark.parametrize('kind', ['forward', 'pre', 'backward'])
    @pytest.mark.parametrize('mode', ['training', 'gradients', 'inference'])
    def test_hooks_on_every_name_run_once(
        self, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As explanations, distillation and pruning rely on; those of ``feature_info``, too."""
        monkeypatch.setattr(row_strips, 'BYTES_PER_THREAD', 1 << 12)
        if (kind, mode) == ('backward', 'inference'):
            pytest.skip('there is no backward pass')
        for one_by_one in (False, True):
            model, x = tiny(final_norm=True).train(mode == 'training'), torch.rand(2, 3, 64, 64)
            names = [n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)]
            names = [n for n in names if not re.match(r'stages.\d.0.drop_path', n)]  # no residual
            seen: list[str] = []
            for hooked in [[name] for name in names] if one_by_one else [names]:
                handles = [self.hook(model.get_submodule(name), kind, name, seen) for name in hooked]
                with torch.set_grad_enabled(mode != 'inference'):
                    maps = model(x.requires_grad_(kind == 'backward'))
                if kind == 'backward':
                    sum(m.sum() for m in maps).backward()
                for handle in handles:
                    handle.remove()
            assert sorted(seen) == sorted(names)

    @staticmethod
    def hook(module: nn.Module, kind: str, name: str, seen: list[str]) -> Any:
        register = {
            'forward': module.register_forward_hook,
            'pre': module.register_forward_pre_hook,
            'backward': module.register_full_backward_hook,
        }[kind]
        return register(lambda *args: seen.append(name))

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
        """On feature maps of a backbone that does not."""
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
