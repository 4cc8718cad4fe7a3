"""Packed weights of a deployed network: the same function, whatever is done to the layer."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, Callable, Iterator

import pytest
import torch
from helpers.networks import deployed, relative, tiny
from torch import Tensor, nn
from torch.nn.utils import prune

from emo2_mm import cpu
from emo2_mm.cpu import PackedLinear, packed_linear
from emo2_mm.cpu.packed_linear import HAS_ONEDNN, linear

pytestmark = [
    pytest.mark.both_stacks,
    pytest.mark.skipif(not HAS_ONEDNN, reason='this torch has no oneDNN, or hides it'),
]

LIMIT = 1e-6  # of rounding in float32


def layer(bias: bool = True, seed: int = 0) -> PackedLinear:
    torch.manual_seed(seed)
    return PackedLinear(11, 21, bias).requires_grad_(False)


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    yield
    cpu.enable(True)


@pytest.fixture(autouse=True, params=['oneDNN', 'MKL'])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == 'MKL' and not packed_linear.HAS_MKL:
        pytest.skip('this torch has no MKL')
    monkeypatch.setattr(packed_linear, 'USES_MKL', request.param == 'MKL')


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The packed weights that were used."""
    found, packed_weight = [], PackedLinear.packed_weight

    def spy(self: PackedLinear, rows: int) -> Any:
        made = packed_weight(self, rows)
        found.append(None if made is None else made.packed)
        return made

    monkeypatch.setattr(PackedLinear, 'packed_weight', spy)
    return found


class TestLinear:
    @pytest.mark.parametrize('shape', [(1, 1, 1), (1, 7, 3), (3, 2, 5), (2, 30, 31)], ids=str)
    @pytest.mark.parametrize('bias', [True, False])
    @pytest.mark.parametrize('gelu', [True, False])
    @torch.no_grad()
    def test_equals_the_layer(
        self, gelu: bool, bias: bool, shape: tuple[int, ...], packed: list[Tensor]
    ) -> None:
        own, x = layer(bias), torch.randn(*shape, 11)
        before, y = x.clone(), linear(own, x, gelu)
        assert packed[0] is not None
        assert y.is_contiguous()
        assert torch.equal(x, before)
        expected = nn.functional.gelu(own(x)) if gelu else own(x)
        torch.testing.assert_close(y, expected, rtol=LIMIT, atol=LIMIT)

    @torch.no_grad()
    def test_of_nothing(self, packed: list[Tensor]) -> None:
        assert linear(layer(), torch.randn(0, 4, 4, 11)).shape == (0, 4, 4, 21)
        assert not packed

    @torch.no_grad()
    def test_rounding_does_not_depend_on_earlier_inputs(self) -> None:
        own, shapes = layer(), [(1, 16, 16, 11), (2, 3, 5, 11), (1, 1, 1, 11)]
        images = [torch.randn(shape) for shape in shapes]
        expected = [linear(deepcopy(own), x) for x in images]
        for i in (0, 1, 2, 1, 0):
            assert torch.equal(linear(own, images[i]), expected[i])
            plain = nn.functional.linear(images[i], own._parameters['weight'], own.bias)
            torch.testing.assert_close(expected[i], plain, rtol=LIMIT, atol=LIMIT)

    @torch.no_grad()
    def test_layout_does_not_matter(self) -> None:
        """oneDNN takes a bias by its address alone."""
        own, x = layer(), torch.randn(2, 11, 3, 5).permute(0, 2, 3, 1)
        for y in (x, x[:, ::2]):
            torch.testing.assert_close(linear(own, y), own(y), rtol=LIMIT, atol=LIMIT)
        own.bias.data = torch.randn(42)[::2]
        torch.testing.assert_close(linear(own, x), own(x), rtol=LIMIT, atol=LIMIT)
        own.weight.data = torch.randn(11, 21).t()
        torch.testing.assert_close(linear(own, x), own(x), rtol=LIMIT, atol=LIMIT)

    @torch.no_grad()
    def test_without_onednn(self, packed: list[Tensor]) -> None:
        """As a user may choose."""
        own, x = layer(), torch.randn(1, 2, 3, 11)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(linear(own, x), own(x))
        assert packed == [None]

    def test_is_visible(self) -> None:
        assert 'PackedLinear(in_features=11, out_features=21, bias=True)' in repr(nn.Sequential(layer()))
        assert isinstance(layer(), nn.Linear)

    def test_only_linear_layers_are_packed(self) -> None:
        class Other(nn.Linear):
            pass

        model, called = nn.Sequential(nn.Linear(2, 2), Other(2, 2), nn.Sequential(nn.Linear(2, 2))), []
        model[0].register_forward_hook(lambda *args: called.append(1))
        cpu.pack_linear_layers(model)
        assert [type(m) for m in (model[0], model[1], model[2][0])] == [PackedLinear, Other, PackedLinear]
        model(torch.rand(2))
        assert called


def swap(own: nn.Linear, other: nn.Linear) -> None:
    """As MMEngine's EMAHook swaps averaged weights in."""
    own.weight.data.copy_(other.weight.data)


CHANGES: dict[str, Callable[[nn.Linear, nn.Linear], Any]] = {
    'in place': lambda own, other: own.weight.copy_(other.weight),
    'a row in place': lambda own, other: own.weight[3].zero_(),
    'load_state_dict': lambda own, other: own.load_state_dict(other.state_dict()),
    'data': lambda own, other: setattr(own.weight, 'data', other.weight.clone()),
    'in place through data': swap,
    'scaled through data': lambda own, other: own.weight.data.mul_(2),
    'one element through data': lambda own, other: own.weight.data[3, 5].add_(9),
    'NumPy': lambda own, other: own.weight.numpy().fill(0.5),
    'the same memory in another order': lambda own, other: setattr(
        own, 'weight', nn.Parameter(own.weight.detach().view(11, 21).t())
    ),
    'another parameter': lambda own, other: setattr(own, 'weight', nn.Parameter(other.weight.clone())),
    'there and back': lambda own, other: own.double().float().weight.mul_(3),
}


class TestWeights:
    @torch.no_grad()
    def test_are_packed_once(self, packed: list[Tensor]) -> None:
        own = layer()
        for _ in range(3):
            linear(own, torch.randn(1, 2, 2, 11))
        assert len(packed) == 3
        assert packed[0] is packed[1] is packed[2]

    @pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_follow_a_change(self, change: Callable[[nn.Linear, nn.Linear], None]) -> None:
        own, x = layer(), torch.randn(1, 4, 5, 11)
        before = linear(own, x)
        change(own, layer(seed=1))
        y = linear(own, x)
        assert relative(before, y) > 0.05
        torch.testing.assert_close(y, own(x), rtol=LIMIT, atol=LIMIT)

    @torch.no_grad()
    def test_of_a_pruned_layer(self) -> None:
        """Pruning puts a plain attribute in the place of the parameter."""
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        before, project = model(x), model.stages[1][1].project
        prune.l1_unstructured(project, 'weight', amount=0.5)
        maps = model(x)
        assert relative(before[1], maps[1]) > 1e-3
        cpu.enable(False)
        assert relative(maps[1], model(x)[1]) < 1e-6
        prune.remove(project, 'weight')
        cpu.enable(True)
        assert relative(model(x)[1], maps[1]) < 1e-6

    @torch.inference_mode()
    def test_whose_changes_torch_does_not_track(self, packed: list[Tensor]) -> None:
        """Tensors made in inference mode have no version."""
        model, other, x = deployed(), deployed(seed=1), torch.rand(1, 3, 32, 32)
        assert model.stages[0][0].project.weight.is_inference()
        before = model(x)
        model.load_state_dict(other.state_dict())
        assert not any(torch.equal(a, b) for a, b in zip(model(x), before))
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x)))
        assert set(packed) == {None}

    @pytest.mark.parametrize(
        'copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'file']
    )
    @torch.no_grad()
    def test_of_a_copy_are_its_own(
        self, copy: Callable[[nn.Linear], nn.Linear], packed: list[Tensor]
    ) -> None:
        own, x = layer(), torch.randn(1, 4, 5, 11)
        before = linear(own, x)
        other = copy(own)
        assert other._packed is None
        other.weight.mul_(2)
        torch.testing.assert_close(linear(other, x), other(x), rtol=LIMIT, atol=LIMIT)
        assert torch.equal(linear(own, x), before)
        assert None not in packed

    @torch.no_grad()
    def test_are_not_in_the_state(self) -> None:
        model = deployed()
        names = set(model.state_dict())
        model(torch.rand(1, 3, 32, 32))
        assert set(model.state_dict()) == names
        assert not [name for name in names if 'packed' in name]


class TestNetwork:
    @pytest.mark.parametrize('size', [(33, 70), (64, 64)])
    @torch.no_grad()
    def test_uses_them_in_each_linear_layer(
        self, size: tuple[int, int], packed: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = deployed(), torch.rand(1, 3, *size)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        maps = model(x)
        assert len(packed) == len(layers)
        assert None not in packed
        monkeypatch.setattr(packed_linear, 'HAS_ONEDNN', False)
        for a, b in zip(maps, model(x)):
            assert relative(a, b) < 1e-6

    def test_only_where_deployed_and_nothing_is_differentiated(self, packed: list[Tensor]) -> None:
        """What is trained and evaluated by turns would have to be packed each time."""
        x = torch.rand(1, 3, 32, 32, requires_grad=True)
        with torch.no_grad():
            tiny().eval()(x)
        deployed()(x)[0].sum().backward()
        assert x.grad.any()
        assert not packed

    @torch.no_grad()
    def test_not_in_other_precisions(self, packed: list[Tensor]) -> None:
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert all(m.dtype == torch.bfloat16 for m in model(x))
        deepcopy(model).double()(x.double())
        model.bfloat16()(x.bfloat16())
        assert set(packed) <= {None}

    @pytest.mark.parametrize('make', [nn.Linear, lambda *a, **k: nn.Sequential(nn.Linear(*a, **k))])
    @torch.no_grad()
    def test_a_replaced_layer(self, make: Callable[..., nn.Module]) -> None:
        model, x = deployed(), torch.rand(1, 3, 32, 32)
        before, block = model(x), model.stages[1][1]
        block.project = make(block.project.in_features, block.project.out_features, bias=False).eval()
        maps = model(x)
        assert relative(before[1], maps[1]) > 0.1
        cpu.enable(False)
        assert relative(maps[1], model(x)[1]) < 1e-6
