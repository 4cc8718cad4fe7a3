"""The depth-wise convolution is torch's, in its gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from emo2_mm.depthwise import DepthwiseConv2d


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
