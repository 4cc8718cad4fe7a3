"""Derivatives of all kinds are those of the modules."""

from __future__ import annotations

from typing import Callable, Iterator

import pytest
import torch
from helpers.networks import assert_close, tiny
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from emo2_mm import EMOv2, cpu

CONV, ATTEND, FIRST = (1, 1), (2, 1), (2, 0)


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    yield
    cpu.enable(True)


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def both(function: Callable[[EMOv2], dict[str, Tensor]], training: bool = False) -> None:
    """Compare what a function makes of a network with and without the fast path."""
    found = []
    for on in (True, False):
        cpu.enable(on)
        found.append(function(tiny().double().train(training)))
    assert_close(*found)


def named(tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors) if t is not None}


@pytest.mark.parametrize('training', [False, True])
class TestTwice:
    @pytest.mark.parametrize('of', ['image', 'weights'])
    def test_gradient_penalty(self, of: str, training: bool) -> None:
        def penalty(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 3, 33, 40).requires_grad_()
            leaves = [x, *model.parameters()]
            loss = sum(m.square().sum() for m in model(x))
            gradients = torch.autograd.grad(loss, x if of == 'image' else leaves[1:], create_graph=True)
            (loss + sum(g.square().sum() for g in gradients)).backward()
            return named(tuple(leaf.grad for leaf in leaves))

        both(penalty, training)

    def test_third_derivative(self, training: bool) -> None:
        def third(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 3, 33, 33).requires_grad_()
            y = sum(m.sum() for m in model(x))
            for _ in range(3):
                (grad,) = torch.autograd.grad(y, x, create_graph=True)
                y = grad.square().sum()
            return {'x': grad.detach()}

        both(third, training)

    def test_of_a_block_that_is_used_twice(self, training: bool) -> None:
        """The input of its second use depends on its weights."""

        def twice(model: EMOv2) -> dict[str, Tensor]:
            block, x = model.stages[2][1], image(2, 5, 4, 16).requires_grad_()
            y = block(block(x)).square().sum()
            leaves = [x, *block.parameters()]
            gradients = torch.autograd.grad(y, leaves, create_graph=True)
            return named((*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)))

        both(twice, training)

    @pytest.mark.parametrize('frozen', ['norm', 'project', 'depthwise', 'qk', 'bias', 'stem'])
    def test_of_what_is_not_frozen(self, frozen: str, training: bool) -> None:
        def penalty(model: EMOv2) -> dict[str, Tensor]:
            for name, p in model.named_parameters():
                p.requires_grad_(frozen not in name)
            leaves = [p for p in model.parameters() if p.requires_grad]
            loss = model(image(2, 3, 33, 33))[-1].square().sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            sum(g.square().sum() for g in gradients).backward()
            return named(tuple(p.grad for p in leaves))

        both(penalty, training)

    def test_in_mixed_precision(self, training: bool) -> None:
        """As near to full precision as the modules are."""
        found = []
        for on, narrow in ((False, False), (True, True), (False, True)):
            cpu.enable(on)
            model, x = tiny().train(training), image(4, 3, 64, 64).float().requires_grad_()
            with torch.autocast('cpu', torch.bfloat16, narrow):
                y = model(x)[2].float().square().mean()
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            grad.square().sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        exact, ours, theirs = found
        assert (ours - exact).norm() < max(1.5 * (theirs - exact).norm(), 1e-2 * exact.norm())


class TestTransforms:
    def test_grad(self) -> None:
        def grad(model: EMOv2) -> dict[str, Tensor]:
            parameters = dict(model.named_parameters())

            def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
                return torch.func.functional_call(model, parameters, (x,))[-1].square().sum()

            return {n: g.detach() for n, g in torch.func.grad(loss)(parameters, image(1, 3, 33, 40)).items()}

        both(grad)

    def test_vmap(self) -> None:
        def vmap(model: EMOv2) -> dict[str, Tensor]:
            images = image(3, 3, 33, 40)
            maps = torch.func.vmap(lambda x: tuple(m[0] for m in model(x[None])))(images)
            for a, b in zip(maps, model(images)):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            return named(maps)

        both(vmap)

    def test_jacrev_jvp_and_hessian(self) -> None:
        def jacobian(model: EMOv2) -> dict[str, Tensor]:
            block, x = model.stages[2][1], image(1, 2, 2, 16)
            jacobian = torch.func.jacrev(lambda x: block(x).sum((1, 2)))(x)
            _, tangent = torch.func.jvp(block, (x,), (x,))
            hessian = torch.func.hessian(lambda x: block(x[..., :1] * x).square().sum())(x)
            return named((jacobian, tangent, hessian))

        both(jacobian)

    def test_gradients_of_each_sample(self) -> None:
        def gradients(model: EMOv2) -> dict[str, Tensor]:
            parameters = {n: p.detach() for n, p in model.named_parameters()}

            def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
                return torch.func.functional_call(model, parameters, (x[None],))[-1].square().sum()

            return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, image(2, 3, 33, 33))

        both(gradients)

    @pytest.mark.parametrize('grad', [False, True])
    def test_forward_mode(self, grad: bool) -> None:
        def tangents(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 3, 33, 40)
            with torch.set_grad_enabled(grad), forward_ad.dual_level():
                maps = model(forward_ad.make_dual(x, torch.ones_like(x)))
                return named(tuple(forward_ad.unpack_dual(m).tangent for m in maps))

        both(tangents)
        cpu.enable(True)
        assert len(tangents(tiny().double().eval())) == 4

    def test_batched_gradients(self) -> None:
        """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for."""

        def gradients(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 3, 33, 40).requires_grad_()
            y = model(x)[-1]
            several = torch.stack([torch.ones_like(y), y.detach()])
            return named(
                torch.autograd.grad(
                    y, [x, *model.parameters()], several, is_grads_batched=True, allow_unused=True
                )
            )

        both(gradients)


class TestGraphs:
    def test_saved_tensors_may_be_moved(self) -> None:
        def gradients(model: EMOv2) -> dict[str, Tensor]:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
                y = sum(m.square().sum() for m in model(image(2, 3, 33, 40)))
            y.backward()
            return named(tuple(p.grad for p in model.parameters()))

        both(gradients, training=True)

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpoints_of_others(self, reentrant: bool) -> None:
        def gradients(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 33, 40, 4).requires_grad_()
            checkpoint(model.stages[0], x, use_reentrant=reentrant).square().sum().backward()
            return {'x': x.grad, **named(tuple(p.grad for p in model.stages[0].parameters()))}

        both(gradients)

    def test_backward_pass_may_run_twice(self) -> None:
        model, x = tiny().double().train(), image(2, 3, 33, 40).requires_grad_()
        y = sum(m.square().sum() for m in model(x))
        leaves = [x, *model.parameters()]
        first = torch.autograd.grad(y, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, leaves)))

    def test_statistics_move_once(self) -> None:
        """Also where the gradient is differentiated, and the forward pass computed again for it."""

        def statistics(model: EMOv2) -> dict[str, Tensor]:
            x = image(2, 3, 33, 40).requires_grad_()
            (grad,) = torch.autograd.grad(model(x)[-1].square().sum(), x, create_graph=True)
            grad.square().sum().backward()
            return {n: b.double() for n, b in model.named_buffers()}

        both(statistics, training=True)
