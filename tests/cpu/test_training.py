"""The depth-wise convolution is torch's, in its gradients too; so is what is computed together with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emo2_mm.depthwise import DepthwiseConv2d, mix_and_project
from emo2_mm.inplace import SiLU


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('kernel', 'h', 'w'), [(5, 9, 8), (5, 1, 2), (3, 7, 12), (5, 16, 15)])
def test_output_and_gradients_equal_those_of_conv2d(
    kernel: int, h: int, w: int, stride: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(6, kernel, stride).double()
    x = torch.randn(2, 6, h, w, dtype=torch.double).contiguous(memory_format=layout)
    weight = conv.weight.detach().clone().requires_grad_()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = conv(x1)
    y2 = F.conv2d(x2, weight, None, stride, kernel // 2, groups=6)
    grad = torch.randn_like(y2)
    y1.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(y1, y2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('frozen', ['input', 'weight'])
def test_gradient_of_only_one_side(frozen: str) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(4, 5)
    x = torch.randn(1, 4, 8, 8, requires_grad=frozen != 'input')
    conv.weight.requires_grad_(frozen != 'weight')
    conv(x).sum().backward()
    assert (x.grad is None) == (frozen == 'input')
    assert (conv.weight.grad is None) == (frozen == 'weight')


def test_mixed_precision_gives_gradients_in_the_dtype_of_the_leaves() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(8, 5, stride=2)
    x = torch.randn(2, 8, 10, 10, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = conv(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == conv.weight.grad.dtype == torch.float32
    x2 = x.detach().clone().requires_grad_()
    F.conv2d(x2, conv.weight.detach(), None, 2, 2, groups=8).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=2e-2, atol=2e-2)


def test_a_model_with_gradients_can_be_traced() -> None:
    """As the FLOPs counters of the code bases do."""
    conv, x = DepthwiseConv2d(4, 5), torch.randn(1, 4, 8, 8, requires_grad=True)
    assert torch.equal(torch.jit.trace(conv, x)(x), conv(x))


def test_a_compiled_graph_holds_the_plain_convolution() -> None:
    torch.manual_seed(0)
    conv, x = DepthwiseConv2d(4, 5), torch.randn(1, 4, 8, 8, requires_grad=True)
    y = torch.compile(conv, backend='eager', fullgraph=True)(x)
    assert torch.equal(y, conv(x))
    assert 'Convolution' in type(y.grad_fn).__name__
    assert 'ForwardKernelsOnly' in type(conv(x).grad_fn).__name__


NORMS = {
    'affine': {},
    'cumulative': dict(momentum=None),
    'plain': dict(affine=False),
    'batch': dict(track_running_stats=False),
}


class Parts:
    """The parts of a block that are computed together, and what they compute, step by step."""

    def __init__(self, act: str, stride: int, training: bool = True, **norm: Any) -> None:
        torch.manual_seed(0)
        self.act = {'SiLU': SiLU, 'GELU': nn.GELU, 'Identity': nn.Identity}[act]()
        self.depthwise = DepthwiseConv2d(6, 5, stride)
        self.norm = nn.BatchNorm2d(6, 1e-6, **norm).train(training)
        self.project = nn.Linear(6, 4, bias=False)
        if self.norm.affine:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)
        if self.norm.track_running_stats:
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        self.modules = nn.ModuleList([self.depthwise, self.norm, self.project]).double()
        self.x = torch.randn(2, 7, 6, 6, dtype=torch.double, requires_grad=True)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return dict(self.modules.named_parameters(), x=self.x)

    def together(self) -> Tensor:
        return mix_and_project(self.x, self.act, self.depthwise, self.norm, self.project)

    def step_by_step(self) -> Tensor:
        e = self.act(self.x).permute(0, 3, 1, 2)
        stride = self.depthwise.stride[0]
        local = F.silu(self.norm(F.conv2d(e, self.depthwise.weight, None, stride, 2, groups=6)))
        return self.project((local if stride == 2 else local + e).permute(0, 2, 3, 1))


def gradients(y: Tensor, leaves: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad, **kwargs)))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12, msg=name)


class TestMixAndProject:
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('norm', NORMS)
    @pytest.mark.parametrize('stride', [1, 2])
    @pytest.mark.parametrize('act', ['SiLU', 'GELU', 'Identity'])
    def test_equals_the_steps(self, act: str, stride: int, norm: str, training: bool) -> None:
        one, other = (Parts(act, stride, training, **NORMS[norm]) for _ in range(2))
        for _ in range(2):  # statistics move
            y, expected = one.together(), other.step_by_step()
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert_same(gradients(y, one.leaves), gradients(expected, other.leaves))
            assert_same(dict(one.norm.named_buffers()), dict(other.norm.named_buffers()))
        if NORMS[norm].get('track_running_stats', True):
            assert one.norm.num_batches_tracked == (2 if training else 0)

    @pytest.mark.parametrize('stride', [1, 2])
    @pytest.mark.parametrize('frozen', ['0.weight', '1.weight', '1.bias', '2.weight', '1', 'all but x'])
    def test_what_is_frozen_changes_no_other_gradient(self, frozen: str, stride: int) -> None:
        parts = Parts('SiLU', stride)
        expected = gradients(parts.step_by_step(), parts.leaves)
        asked = {
            name: leaf
            for name, leaf in parts.leaves.items()
            if (name == 'x' if frozen == 'all but x' else not name.startswith(frozen))
        }
        for name, leaf in parts.leaves.items():
            leaf.requires_grad_(name in asked)
        assert_same(gradients(parts.together(), asked), {name: expected[name] for name in asked})

    def test_keeps_two_wide_maps(self) -> None:
        parts = Parts('SiLU', 1)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            parts.together()
        weights = sum(p.numel() for p in parts.modules.parameters())
        assert sum(t.numel() for t in kept) == 2 * parts.x.numel() + weights

    def test_backward_pass_may_run_twice(self) -> None:
        parts = Parts('SiLU', 1)
        y = parts.together()
        first = gradients(y, parts.leaves, retain_graph=True)
        for name, second in gradients(y, parts.leaves).items():
            assert torch.equal(first[name], second)

    @pytest.mark.parametrize('act', ['SiLU', 'GELU'])
    def test_what_is_kept_may_lie_elsewhere(self, act: str) -> None:
        """As with ``torch.autograd.graph.save_on_cpu``, which hands out copies."""
        parts = Parts(act, 1)
        expected = gradients(parts.step_by_step(), parts.leaves)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            y = parts.together()
        assert_same(gradients(y, parts.leaves), expected)

    @pytest.mark.parametrize('training', [True, False])
    def test_mode_counts_at_the_forward_pass(self, training: bool) -> None:
        parts = Parts('SiLU', 1, training)
        y, expected = parts.together(), parts.step_by_step()
        parts.norm.train(not training)
        assert_same(gradients(y, parts.leaves), gradients(expected, parts.leaves))

    def test_second_derivatives_are_refused(self) -> None:
        parts = Parts('GELU', 1)
        (grad,) = torch.autograd.grad(parts.together().square().sum(), parts.x, create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'):
            grad.sum().backward()

    @pytest.mark.parametrize('stride', [1, 2])
    @pytest.mark.parametrize('training', [True, False])
    def test_mixed_precision(self, training: bool, stride: int) -> None:
        parts = Parts('SiLU', stride, training)
        exact = parts.step_by_step()
        expected = gradients(exact, parts.leaves)
        parts.modules.float()
        parts.x = parts.x.detach().bfloat16().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = parts.together()
        assert y.dtype == torch.bfloat16
        assert ((y - exact).norm() / exact.norm()).item() < 2e-2
        grad = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        y.backward(grad.bfloat16())
        for name, leaf in parts.leaves.items():
            assert leaf.grad.dtype == (torch.bfloat16 if name == 'x' else torch.float32)
            error = (leaf.grad - expected[name]).norm() / expected[name].norm()
            assert error < 5e-2, name
