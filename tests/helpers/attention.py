"""SEW-MHSA as a loop over windows."""

from __future__ import annotations

import torch
from torch import Tensor

from emo2_mm.attention import SEWMHSA


def naive_attention(module: SEWMHSA, x: Tensor) -> Tensor:
    """SEW-MHSA of one image (H, W, C), one window and one head at a time."""
    h, w, c = x.shape
    size, heads = module.window_size, module.heads
    n1, n2 = -(-h // size), -(-w // size)
    padded = x.new_zeros(n1 * size, n2 * size, c)
    padded[:h, :w] = x
    q, k = (padded @ module.qk.weight.T + module.qk.bias).split(c, dim=-1)
    v = torch.nn.functional.gelu(padded @ module.v.weight.T + module.v.bias)
    d, dv = c // heads, v.shape[-1] // heads
    out = torch.zeros_like(v)
    for i in range(n1):
        for j in range(n2):
            neighbour = [(i * size + a, j * size + b) for a in range(size) for b in range(size)]
            distant = [(a * n1 + i, b * n2 + j) for a in range(size) for b in range(size)]
            for tokens in (neighbour, distant):
                rows, columns = zip(*tokens)
                for head in range(heads):
                    qs = q[rows, columns, head * d : (head + 1) * d]
                    ks = k[rows, columns, head * d : (head + 1) * d]
                    vs = v[rows, columns, head * dv : (head + 1) * dv]
                    attention = (qs @ ks.T * d**-0.5).softmax(-1)
                    out[rows, columns, head * dv : (head + 1) * dv] += attention @ vs
    return out[:h, :w]
