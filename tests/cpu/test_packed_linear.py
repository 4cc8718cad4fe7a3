"""Packed weights of a deployed network: the same function, whatever is done to the layer."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, Callable

import pytest
import torch
from emo2_mm.packed import HAS_ONEDNN, linear, packed_weight
from test_emov2 import relative, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emo2_mm import EMOv2, inference, packed

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason='this torch has no oneDNN, or hides it')

LIMIT = 1e-6  # of rounding in float32


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(11, 21, bias).requires_grad_(False)


def through_a_file(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def run(layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    return linear(layer, packed_weight(layer), x, gelu)


def deployed(**kwargs: Any) -> EMOv2:
    model = tiny(**kwargs).eval()
    model.switch_to_deploy()
    return model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The packed weights that were used."""
    found, weight_of = [], packed.Packed.weight_of

    def spy(self: packed.Packed, layer: nn.Linear) -> Tensor:
        found.append(weight_of(self, layer))
        return found[-1]

    monkeypatch.setattr(packed.Packed, 'weight_of', spy)
    return found


class TestLinear:
    @pytest.mark.parametrize('shape', [(1, 1, 1), (1, 7, 3), (3, 2, 5), (2, 30, 31), (0, 4, 4)], ids=str)
    @pytest.mark.parametrize('bias', [True, False])
    @pytest.mark.parametrize('gelu', [True, False])
    @torch.no_grad()
    def test_equals_the_layer(self, gelu: bool, bias: bool, shape: tuple[int, ...]) -> None:
        own, x = layer(bias), torch.randn(*shape, 11)
        before, y = x.clone(), run(own, x, gelu)
        assert y.is_contiguous()
        assert torch.equal(x, before)
        expected = nn.functional.gelu(own(x)) if gelu else own(x)
        torch.testing.assert_close(y, expected, rtol=LIMIT, atol=LIMIT)

    @torch.no_grad()
    def test_layout_does_not_matter(self) -> None:
        """oneDNN takes a bias by its address alone."""
        own, x = layer(), torch.randn(2, 11, 3, 5).permute(0, 2, 3, 1)
        for y in (x, x[:, ::2]):
            torch.testing.assert_close(run(own, y), own(y), rtol=LIMIT, atol=LIMIT)
        own.bias.data = torch.randn(42)[::2]
        own.weight.data = torch.randn(11, 21).t()
        torch.testing.assert_close(run(own, x), own(x), rtol=LIMIT, atol=LIMIT)


CHANGES: dict[str, Callable[[nn.Linear, nn.Linear], None]] = {
    'in place': lambda own, other: own.weight.copy_(other.weight),
    'load_state_dict': lambda own, other: own.load_state_dict(other.state_dict()),
    'data': lambda own, other: setattr(own.weight, 'data', other.weight.clone()),
    'the same memory in another order': lambda own, other: setattr(
        own, 'weight', nn.Parameter(own.weight.detach().view(11, 21).t())
    ),
    'another parameter': lambda own, other: setattr(own, 'weight', nn.Parameter(other.weight.clone())),
}


class TestWeights:
    @torch.no_grad()
    def test_are_packed_once(self, made: list[Tensor]) -> None:
        own = layer()
        for _ in range(3):
            run(own, torch.randn(1, 2, 2, 11))
        assert len(made) == 3
        assert made[0] is made[1] is made[2]

    @pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_change(self, change: Callable[[nn.Linear, nn.Linear], None]) -> None:
        own, other, x = layer(), nn.Linear(11, 21), torch.randn(1, 4, 5, 11)
        before = run(own, x)
        change(own, other)
        y = run(own, x)
        assert relative(before, y) > 0.1
        torch.testing.assert_close(y, own(x), rtol=LIMIT, atol=LIMIT)

    @torch.inference_mode()
    def test_change_where_torch_does_not_tell(self) -> None:
        """Tensors made in inference mode have no version."""
        model, other, x = deployed(), tiny(seed=1).eval(), torch.rand(1, 3, 32, 32)
        other.switch_to_deploy()
        assert model.stages[0][0].project.weight.is_inference()
        before = model(x)
        model.load_state_dict(other.state_dict())
        assert not any(torch.equal(a, b) for a, b in zip(model(x), before))
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x)))

    @pytest.mark.parametrize(
        'copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'file']
    )
    @torch.no_grad()
    def test_of_a_copy_are_its_own(self, copy: Callable[[nn.Linear], nn.Linear], made: list[Tensor]) -> None:
        own, x = layer(), torch.randn(1, 4, 5, 11)
        before = run(own, x)
        other = copy(own)
        other.weight.mul_(2)
        torch.testing.assert_close(run(other, x), other(x), rtol=LIMIT, atol=LIMIT)
        assert torch.equal(run(own, x), before)
        assert len(made) == 3

    def test_are_not_in_the_state(self) -> None:
        model = deployed()
        names = set(model.state_dict())
        with torch.no_grad():
            model(torch.rand(1, 3, 32, 32))
        assert set(model.state_dict()) == names
        assert not [name for name in names if 'packed' in name]


class TestNetwork:
    @pytest.mark.parametrize('size', [(33, 70), (64, 64)])
    @torch.no_grad()
    def test_uses_them_in_each_linear_layer(
        self, size: tuple[int, int], made: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = deployed(), torch.rand(1, 3, *size)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        maps = model(x)
        assert len(made) == len(layers)
        monkeypatch.setattr(inference, 'HAS_ONEDNN', False)
        for a, b in zip(maps, model(x)):
            assert relative(a, b) < 1e-6
        assert len(made) == len(layers)

    @torch.no_grad()
    def test_only_where_deployed(self, made: list[Tensor]) -> None:
        """What is trained and evaluated by turns would have to be packed each time."""
        tiny().eval()(torch.rand(1, 3, 32, 32))
        assert not made

    def test_not_where_gradients_are_asked_for(self, made: list[Tensor]) -> None:
        x = torch.rand(1, 3, 32, 32, requires_grad=True)
        deployed()(x)[0].sum().backward()
        assert x.grad.any()
        assert not made

    @torch.no_grad()
    def test_not_in_other_precisions(self, made: list[Tensor]) -> None:
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert all(m.dtype == torch.bfloat16 for m in model(x))
        deepcopy(model).double()(x.double())
        model.bfloat16()(x.bfloat16())
        assert not made

    @pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
    @torch.no_grad()
    def test_not_where_operations_are_recorded(self, made: list[Tensor]) -> None:
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        traced = torch.jit.trace(model, x, check_trace=False)
        assert not made
        for a, b in zip(traced(x), model(x)):
            assert relative(a, b) < 1e-5

    @torch.no_grad()
    def test_counters_of_operations_see_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They know torch's public operators."""
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        with FlopCounterMode(display=False) as found:
            model(x)
        monkeypatch.setattr(inference, 'HAS_ONEDNN', False)
        with FlopCounterMode(display=False) as expected:
            model(x)
        assert found.get_total_flops() == expected.get_total_flops() > 1e5

    @torch.no_grad()
    def test_transforms_of_functions(self, made: list[Tensor]) -> None:
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        y, _ = torch.func.jvp(lambda x: model(x)[3], (x,), (x,))
        assert not made
        assert relative(y, model(x)[3]) < 1e-6

    @torch.no_grad()
    def test_another_layer(self) -> None:
        """One of the same kind needs no preparation."""
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        before, block = model(x), model.stages[1][1]
        block.project = nn.Linear(block.project.in_features, block.project.out_features, bias=False).eval()
        maps = model(x)
        assert relative(before[1], maps[1]) > 0.1
        assert torch.equal(maps[1], model(x)[1])

    @torch.no_grad()
    def test_replaced_layers_are_called(self) -> None:
        """As dynamic quantisation replaces them."""
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        before = model(x)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, nn.Sequential(child, nn.Hardtanh(-0.01, 0.01)))
        assert all(relative(a, b) > 0.1 for a, b in zip(model(x), before))
