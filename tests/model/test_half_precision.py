"""16 bits: finite at the edge of the range, and as near to float32 as the plain network."""

from __future__ import annotations

from copy import deepcopy
from typing import Callable, Iterator

import plain_emov2
import pytest
import torch
from helpers.networks import TINY, tiny
from torch import Tensor, nn

from emo2_mm import cpu
from emo2_mm.attention import SEWMHSA
from emo2_mm.cpu.window_attention import gelu_and_attend

pytestmark = pytest.mark.both_stacks

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
Take = Callable[[str, nn.Module], nn.Module]
PATHS = ('eager', 'deployed', 'modules')  # 'modules' is that of GPUs and of traced networks
ROUNDINGS = 5  # of finfo.eps, between two numbers (2**-7, 2**-10); EMOv2 errs by less than 2


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def narrow(request: pytest.FixtureRequest) -> torch.dtype:
    try:
        nn.Conv2d(1, 1, 1).to(request.param)(torch.rand(1, 1, 1, 1, dtype=request.param))
    except RuntimeError:
        pytest.skip(f'this torch does not convolve {request.param} on a CPU')
    return request.param


@pytest.fixture
def take() -> Iterator[Take]:
    def take(path: str, model: nn.Module) -> nn.Module:
        cpu.enable(path != 'modules')
        if path == 'deployed':
            model.switch_to_deploy()
        return model

    yield take
    cpu.enable(True)


def networks() -> tuple[nn.Module, nn.Module]:
    model, plain = tiny().eval(), plain_emov2.PlainEMOv2(TINY, window_size=3)
    plain_emov2.copy_weights(model, plain)
    return model, plain.eval()


def uniform(most: float) -> Tensor:
    return torch.empty(1, 3, 33, 47).uniform_(-most, most)


def images() -> dict[str, Tensor]:
    """Normalised pixels, also the darkest and brightest, and numbers far from all images."""
    torch.manual_seed(0)
    size = 33, 47
    pixels = {
        'random': torch.randint(0, 256, (2, 3, 64, 80)),
        'black': torch.zeros(1, 3, *size),
        'white': torch.full((1, 3, *size), 255.0),
        'black and white': torch.randint(0, 2, (1, 3, *size)) * 255.0,
    }
    found = {name: (x - MEAN) / STD for name, x in pixels.items()}
    found['zeros'] = torch.zeros(1, 3, *size)
    found['1e3'], found['1e4'] = uniform(1e3), uniform(1e4)
    return found


def error(maps: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of a map."""
    assert all(m.isfinite().all() for m in maps)
    return max(((a.double() - b).norm() / b.double().norm()).item() for a, b in zip(maps, exact))


@pytest.mark.parametrize('path', PATHS)
class TestInference:
    def compare(self, model: nn.Module, plain: nn.Module, exact: nn.Module, narrow: torch.dtype) -> None:
        ours, theirs = [], []
        for x in images().values():
            y, dtype = exact(x), next(model.parameters()).dtype
            ours.append(error(model(x.to(dtype)), y))
            theirs.append(error(plain(x.to(dtype)), y))
        eps = torch.finfo(narrow).eps
        assert 0.1 * eps < min(ours) <= max(ours) < ROUNDINGS * eps
        assert sum(ours) < 1.5 * sum(theirs)

    @torch.no_grad()
    def test_narrow_weights(self, path: str, narrow: torch.dtype, take: Take) -> None:
        model, plain = networks()
        model = take(path, model)
        self.compare(model.to(narrow), deepcopy(plain).to(narrow), plain, narrow)

    @torch.no_grad()
    def test_mixed_precision(self, path: str, take: Take) -> None:
        class Mixed(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                with torch.autocast('cpu', dtype=torch.bfloat16):
                    return self.model(x)

        model, plain = networks()
        self.compare(Mixed(take(path, model)), Mixed(plain), plain, torch.bfloat16)

    @torch.no_grad()
    def test_as_far_as_the_plain_network(self, path: str, narrow: torch.dtype, take: Take) -> None:
        """Sums of numbers near the largest one overflow in any network, but not here before there."""
        model, plain = networks()
        model, plain = take(path, model).to(narrow), plain.to(narrow)
        torch.manual_seed(0)
        finite = []
        for most in (1e4, 1.5e4, 2e4, 3e4, 4e4, 5e4, 6e4, 65504.0, 1e9, 1e15):
            x = uniform(most).to(narrow)
            if all(m.isfinite().all() for m in plain(x)):
                finite.append(most)
                assert all(m.isfinite().all() for m in model(x)), most
        assert max(finite) >= (3e4 if narrow == torch.float16 else 1e15)


class TestTraining:
    @staticmethod
    def gradients(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        model = deepcopy(model).train()
        with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
            maps = model(x)
        sum(m.float().square().mean() for m in maps).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    @pytest.fixture
    def mixed(self, narrow: torch.dtype) -> torch.dtype:
        try:
            with torch.autocast('cpu', dtype=narrow):
                return narrow
        except RuntimeError:
            pytest.skip(f'this torch has no mixed precision of {narrow} on a CPU')

    @pytest.mark.parametrize('path', ['eager', 'modules'])
    def test_mixed_precision(self, path: str, mixed: torch.dtype, take: Take) -> None:
        """Batch norms divide by the spread of one image: that of a black one is little but rounding."""
        model, plain = networks()
        model, ours, theirs = take(path, model), 0.0, 0.0
        for name, x in images().items():
            found = self.gradients(model, x, mixed)
            assert found.isfinite().all(), name
            if name in ('random', 'black and white', '1e3'):
                exact = self.gradients(plain, x)
                ours += error((found,), (exact,))
                theirs += error((self.gradients(plain, x, mixed),), (exact,))
        assert 0 < ours < 1.5 * theirs < 0.6


class TestAttention:
    """Of logits so large that 16 bits cannot tell neighbours apart; windows with and without padding."""

    @staticmethod
    def attentions(size: int) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        ours, plain = (kind(64, 128, 32, size).eval() for kind in (SEWMHSA, plain_emov2.Attention))
        return ours, plain

    @staticmethod
    def fast(model: SEWMHSA, x: Tensor) -> Tensor:
        """As within a block on a CPU."""
        return gelu_and_attend(
            model.qk(x), model.v(x), model.qk.bias, model.v.bias, model.window_size, model.heads
        )

    @staticmethod
    def copy(ours: nn.Module, plain: nn.Module) -> None:
        weights = ours.state_dict()
        plain.load_state_dict({k: w[:, :, None, None] if w.ndim == 2 else w for k, w in weights.items()})

    @pytest.mark.parametrize('gain', [1, 10, 60])  # of q and k: logits up to about 2, 240 and 8600
    @torch.no_grad()
    def test_agrees(self, gain: float, narrow: torch.dtype) -> None:
        ours, theirs = 0.0, 0.0
        for size, h, w in ((7, 14, 14), (7, 9, 12), (4, 3, 4), (10, 33, 47), (3, 1, 1)):
            model, plain = self.attentions(size)
            model.qk.weight.mul_(gain)
            self.copy(model, plain)
            x = torch.randn(1, h, w, 64)
            exact = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            ours += error((self.fast(model.to(narrow), x.to(narrow)),), (exact,))
            y = plain.to(narrow)(x.to(narrow).permute(0, 3, 1, 2))
            theirs += error((y.permute(0, 2, 3, 1),), (exact,))
        assert 0 < ours < 1.5 * theirs

    @pytest.mark.parametrize('path', ['eager', 'modules'])
    @pytest.mark.parametrize('size', [(14, 14), (9, 12), (3, 4)])
    def test_products_beyond_the_range(self, size: tuple[int, int], path: str, narrow: torch.dtype) -> None:
        """q and k of 60: their product, 115200, is none of float16, but the logit, 20365, is."""
        model, plain = self.attentions(7)
        with torch.no_grad():
            model.qk.weight.zero_()
            model.qk.bias.fill_(60.0)
        self.copy(model, plain)
        model, x = model.to(narrow), torch.randn(1, *size, 64).to(narrow).requires_grad_()
        if narrow == torch.float16:
            assert plain.to(narrow)(x.permute(0, 3, 1, 2)).isnan().all()
        y = self.fast(model, x) if path == 'eager' else model(x)
        y.float().square().mean().backward()
        for found in (y, x.grad, *(p.grad for p in model.parameters())):
            assert found.isfinite().all()
        assert y.detach().abs().max() > 0.1
        assert x.grad.abs().max() > 0
