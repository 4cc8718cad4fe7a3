"""The depth-wise convolution and the fused end of a block: torch's functions, in their gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import relative
from torch import Tensor, nn

from emo2_mm.cpu.depthwise_conv import trainable_depthwise_conv
from emo2_mm.cpu.training import fused_tail


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('kernel', 'h', 'w'), [(5, 9, 8), (5, 1, 2), (3, 7, 12), (5, 16, 15)])
def test_output_and_gradients_equal_those_of_conv2d(
    kernel: int, h: int, w: int, stride: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, h, w, dtype=torch.double).contiguous(memory_format=layout)
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.double)
    found = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        if ours:
            y = trainable_depthwise_conv(*leaves, stride)
        else:
            y = F.conv2d(*leaves, None, stride, kernel // 2, groups=6)
        grad = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        found.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('frozen', ['input', 'weight'])
def test_gradient_of_only_one_side(frozen: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, 8, requires_grad=frozen != 'input')
    weight = torch.randn(4, 1, 5, 5, requires_grad=frozen != 'weight')
    trainable_depthwise_conv(x, weight, 1).sum().backward()
    assert (x.grad is None) == (frozen == 'input')
    assert (weight.grad is None) == (frozen == 'weight')


def test_mixed_precision_gives_gradients_in_the_dtype_of_the_leaves() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 10, 10, requires_grad=True), torch.randn(8, 1, 5, 5, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = trainable_depthwise_conv(x, weight, 2)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(F.conv2d(x, weight, None, 2, 2, groups=8).sum(), [x, weight])
    for ours, theirs in zip((x.grad, weight.grad), expected):
        assert relative(ours, theirs) < 2e-2


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
        self.act = {'SiLU': nn.SiLU, 'GELU': nn.GELU, 'Identity': nn.Identity}[act]()
        self.depthwise = nn.Conv2d(6, 6, 5, stride, padding=2, groups=6, bias=False)
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

    def fused(self) -> Tensor:
        residual = self.depthwise.stride == (1, 1)
        return fused_tail(self.x, type(self.act), self.depthwise, self.norm, self.project, residual)

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


class TestFusedTail:
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('norm', NORMS)
    @pytest.mark.parametrize('stride', [1, 2])
    @pytest.mark.parametrize('act', ['SiLU', 'GELU', 'Identity'])
    def test_equals_the_steps(self, act: str, stride: int, norm: str, training: bool) -> None:
        one, other = (Parts(act, stride, training, **NORMS[norm]) for _ in range(2))
        for _ in range(2):  # statistics move
            y, expected = one.fused(), other.step_by_step()
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
        assert_same(gradients(parts.fused(), asked), {name: expected[name] for name in asked})

    def test_keeps_two_wide_maps(self) -> None:
        parts = Parts('SiLU', 1)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            parts.fused()
        weights = sum(p.numel() for p in parts.modules.parameters())
        assert sum(t.numel() for t in kept) == 2 * parts.x.numel() + weights

    def test_backward_pass_may_run_twice(self) -> None:
        parts = Parts('SiLU', 1)
        y = parts.fused()
        first = gradients(y, parts.leaves, retain_graph=True)
        for name, second in gradients(y, parts.leaves).items():
            assert torch.equal(first[name], second)

    @pytest.mark.parametrize('act', ['SiLU', 'GELU'])
    def test_what_is_kept_may_lie_elsewhere(self, act: str) -> None:
        """As with ``torch.autograd.graph.save_on_cpu``, which hands out copies."""
        parts = Parts(act, 1)
        expected = gradients(parts.step_by_step(), parts.leaves)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            y = parts.fused()
        assert_same(gradients(y, parts.leaves), expected)

    @pytest.mark.parametrize('training', [True, False])
    def test_mode_counts_at_the_forward_pass(self, training: bool) -> None:
        parts = Parts('SiLU', 1, training)
        y, expected = parts.fused(), parts.step_by_step()
        parts.norm.train(not training)
        assert_same(gradients(y, parts.leaves), gradients(expected, parts.leaves))

    @pytest.mark.parametrize('stride', [1, 2])
    @pytest.mark.parametrize('training', [True, False])
    def test_mixed_precision(self, training: bool, stride: int) -> None:
        parts = Parts('SiLU', stride, training)
        exact = parts.step_by_step()
        expected = gradients(exact, parts.leaves)
        parts.modules.float()
        parts.x = parts.x.detach().bfloat16().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = parts.fused()
        assert y.dtype == torch.bfloat16
        assert ((y - exact).norm() / exact.norm()).item() < 2e-2
        grad = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        y.backward(grad.bfloat16())
        for name, leaf in parts.leaves.items():
            assert leaf.grad.dtype == (torch.bfloat16 if name == 'x' else torch.float32)
            error = (leaf.grad - expected[name]).norm() / expected[name].norm()
            assert error < 5e-2, name
