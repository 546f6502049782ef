"""Norm-aware linear attention: NaLaFormer's mixer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.layers import at_least_float32
from visionmix.mixers.linear import averages, dot, key_levels
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


@register_mixer("norm_aware")
class NormAwareLinearAttention(Attention):
    """Linear attention whose weights sharpen as a query's norm grows, and whose features keep signs apart.

    With ``q, k, v, o = W x``, in each head,

        p   = 3 (0.5 + tanh |q|),   q+- = [relu(q), relu(-q)] / |q|,   k+- = [relu(k), relu(-k)]
        y_i = rot((q+-_i)^p) (1/n sum_j rot((k+-_j)^3)^T v_j) / ((q+-_i)^p mean_j ((k+-_j)^3)^T + 1e-6)
        out = W_o (norm(y + depthwise(v)) * silu(o))

    over the n cells j of the map, where rot turns pairs of channels of each half by row and column, as
    `visionmix.layers.RotaryMap` does. A query of zeros has features of zeros. Time and memory are linear in the cells.
    Powers, turns and normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: NaLaFormer (Meng et al. 2025, arXiv 2506.21137).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim` that leaves each a multiple of 4 channels.
        kernel_size: Rows and columns of the depthwise convolution: an odd number.
        qkv_bias: Whether the projection to q, k, v and o has a bias.

    Raises:
        ValueError: `num_heads` is not such a divisor, or `kernel_size` is even.
    """

    def __init__(self, dim: int, num_heads: int = 3, kernel_size: int = 5, qkv_bias: bool = True, **dd: Any) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        super().__init__(dim, num_heads, qkv_bias, rotary=True, lepe=kernel_size, gate=True, gate_norm=True, **dd)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = at_least_float32(qk).chunk(2, dim=2)
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        power = 3 * (0.5 + torch.tanh(norm))
        # Powers that keep the sign, so that there is one for both halves.
        q = q.sign() * (q.abs() / norm.clamp_min(1e-30)) ** power
        features = torch.cat([q, k**3], dim=2)
        halves = [F.relu(features), F.relu(-features)]
        means = [half.chunk(2, dim=2)[1].mean(dim=1, keepdim=True) for half in halves]
        normaliser = dot(halves[0].chunk(2, dim=2)[0], means[0]) + dot(halves[1].chunk(2, dim=2)[0], means[1]) + 1e-6
        v = at_least_float32(v)
        q, k = self.rotary(halves[0], height, width).chunk(2, dim=2)
        out = averages(q, k, v, normaliser, key_levels(means[0], True))
        q, k = self.rotary(halves[1], height, width).chunk(2, dim=2)
        return out + averages(q, k, v, normaliser, key_levels(means[1], True))
