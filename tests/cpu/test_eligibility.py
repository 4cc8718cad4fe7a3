"""When the fast path is taken, and how it is switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Callable, ContextManager, Iterator

import pytest
import torch
from helpers.networks import TINY, Calls, deployed, relative, tiny
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from emo2_mm import EMOv2, cpu

ALL = 8  # the stem and seven blocks


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    yield Calls(monkeypatch)
    cpu.enable(True)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Own(Tensor):
    pass


class TestTaken:
    @pytest.mark.parametrize('grad', [False, True])
    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    def test_in_eval_mode(self, build: Callable[..., EMOv2], grad: bool, calls: Calls) -> None:
        model = build().eval()
        with torch.set_grad_enabled(grad):
            model(torch.rand(1, 3, 33, 40))
        assert len(calls.modules) == ALL

    @pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
    def test_in_other_precisions(self, dtype: torch.dtype, calls: Calls) -> None:
        with torch.no_grad():
            tiny().eval().to(dtype)(torch.rand(1, 3, 33, 40, dtype=dtype))
        assert len(calls.modules) == ALL

    @pytest.mark.parametrize(
        'kwargs',
        [{}, dict(with_cp=True), dict(norm_eval=True), dict(frozen_stages=2), dict(drop_path_rate=0.5)],
    )
    @pytest.mark.parametrize('autocast', [False, True])
    def test_in_training(self, autocast: bool, kwargs: dict[str, Any], calls: Calls) -> None:
        model = tiny(**kwargs).train()
        with torch.autocast('cpu', torch.bfloat16, autocast):
            sum(m.float().sum() for m in model(torch.rand(2, 3, 33, 40))).backward()
        frozen = 4 if autocast and 'frozen_stages' in kwargs else 0  # they need no gradients
        assert len(calls.modules) == ALL - frozen + (7 if 'with_cp' in kwargs else 0)

    def test_with_parameters_for_an_image(self, calls: Calls) -> None:
        """As adversarial examples are optimised."""
        x = nn.Parameter(torch.rand(1, 3, 33, 40))
        sum(m.sum() for m in tiny().eval()(x)).backward()
        assert x.grad is not None
        assert len(calls.modules) == ALL

    def test_of_a_subclass_of_the_backbone(self, calls: Calls) -> None:
        class Backbone(EMOv2):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                return super().forward(2 * x)

        Backbone(TINY).eval()(torch.rand(1, 3, 32, 32))
        assert len(calls.modules) == ALL


MODES: dict[str, Callable[[], ContextManager]] = {
    'function mode': Functions,
    'dispatch mode': Dispatch,
    'counter': lambda: FlopCounterMode(display=False),
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'forward mode': forward_ad.dual_level,
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    'subclass': lambda x: x.as_subclass(Own),
    'nothing': lambda x: x[:0],
}


class TestNotTaken:
    @pytest.mark.parametrize('mode', MODES)
    @torch.no_grad()
    def test_in_a_mode(self, mode: str, calls: Calls) -> None:
        model, x = tiny().eval(), torch.rand(1, 3, 33, 40)
        with MODES[mode]():
            maps = model(x)
        assert not calls.modules
        for a, b in zip(maps, model(x)):
            assert relative(a, b) < (2e-2 if mode == 'autocast' else 1e-5)

    @pytest.mark.parametrize('kind', INPUTS)
    @torch.no_grad()
    def test_for_an_input(self, kind: str, calls: Calls) -> None:
        maps = tiny().eval()(INPUTS[kind](torch.rand(2, 3, 33, 40)))
        assert not calls.modules
        assert [m.shape[1:] for m in maps] == [(8, 9, 10), (12, 5, 5), (16, 3, 3), (24, 2, 2)]

    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    @torch.no_grad()
    def test_counters_of_operations_see_all(self, build: Callable[..., EMOv2], calls: Calls) -> None:
        model, x, found = build().eval(), torch.rand(1, 3, 32, 32), []
        for on in (True, False):
            cpu.enable(on)
            with FlopCounterMode(display=False) as counter:
                model(x)
            found.append(counter.get_total_flops())
        assert found[0] == found[1] > 1e5

    @pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
    @pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
    @torch.no_grad()
    def test_where_operations_are_traced(self, build: Callable[..., EMOv2], calls: Calls) -> None:
        model, x = build().eval(), torch.rand(1, 3, 32, 32)
        traced = torch.jit.trace(model, x, check_trace=False)
        assert not calls.modules
        for a, b in zip(traced(x), model(x)):
            assert relative(a, b) < 1e-5

    def test_on_other_devices(self) -> None:
        model = tiny().eval()
        assert cpu.why_not(model.stem, torch.rand(1, 3, 32, 32, device='meta')) == 'the input is on meta'

    @torch.no_grad()
    def test_names_the_part(self) -> None:
        model = tiny().eval()
        x, block = torch.rand(1, 4, 4, 12), model.stages[1][1]
        assert cpu.why_not(block, x) is None
        assert 'neither the stem nor a block' in cpu.why_not(model.stages[1], x)
        assert (
            cpu.why_not(block, x.double()) == 'expand.linear is in torch.float32, the input in torch.float64'
        )
        block.depthwise.register_forward_hook(lambda *args: None)
        assert cpu.why_not(block, x) == 'depthwise has hooks'
        block.depthwise_norm.train()
        model.stages[1][0].drop_path = nn.Identity()
        assert cpu.why_not(model.stages[1][0], torch.rand(1, 4, 4, 8)) == 'drop_path is a Identity'


class TestSwitch:
    def test_off_and_on(self, calls: Calls) -> None:
        model, x = tiny().eval(), torch.rand(1, 3, 32, 32)
        cpu.enable(False)
        assert not cpu.is_enabled()
        assert 'enable(False)' in cpu.why_not(model.stem, x)
        model(x)
        assert not calls.modules
        cpu.enable(True)
        model(x)
        assert len(calls.modules) == ALL

    @pytest.mark.parametrize(
        ('value', 'expected'), [(None, 'True'), ('1', 'True'), ('0', 'False'), ('no', 'set it to 0 or 1')]
    )
    def test_environment_variable(self, value: str | None, expected: str) -> None:
        env = {name: v for name, v in os.environ.items() if name != 'EMO2_MM_CPU_FASTPATH'}
        if value is not None:
            env['EMO2_MM_CPU_FASTPATH'] = value
        program = 'from emo2_mm import cpu; print(cpu.is_enabled())'
        done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr


@pytest.mark.parametrize('build', [tiny, deployed], ids=['eager', 'deployed'])
def test_threads_run_one_network(build: Callable[..., EMOv2]) -> None:
    model = build().eval()
    images = [torch.rand(1, 3, 32 + i, 40) for i in range(8)]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return model(x)

    expected = [deepcopy(model)(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, images * 4))
    for i, maps in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(maps, expected[i % 8]))


def test_threads_train_copies_of_one_network() -> None:
    """Another one infers meanwhile, on the original."""
    model, x = tiny().double(), torch.rand(2, 3, 40, 33, dtype=torch.double)
    copies = [deepcopy(model).train() for _ in range(4)]
    model.eval()

    def train(copy: EMOv2) -> Tensor:
        sum(m.square().sum() for m in copy(x)).backward()
        with torch.no_grad():
            model(x)
        return torch.cat([p.grad.flatten() for p in copy.parameters()])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, copies))
    alone = train(deepcopy(model).train())
    assert all(torch.equal(gradients, alone) for gradients in found)


def test_nullcontext_is_a_mode() -> None:
    """Or the tests of modes above would not tell."""
    with nullcontext(), torch.no_grad():
        model = tiny().eval()
        assert cpu.why_not(model.stem, torch.rand(1, 3, 32, 32)) is None
