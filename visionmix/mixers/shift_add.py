"""Linear attention between queries and keys of zeros and ones, whose products are additions: ShiftAddViT's mixer."""

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import Grid, PrimitiveMixture, SequenceMixer, at_least_float32
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@register_mixer("shift_add")
class ShiftAddAttention(SequenceMixer):
    """Linear attention with binary queries and keys, a share of the token itself, and a convolution along the tokens.

    With ``q, k, v = W x``, q and k of length 1 in each head, and ``b(u) = 1 where u > mean(u), else 0`` (the mean over
    all of an image's tokens, heads and channels),

        y   = v / 2 + b(q) (b(k)^T v) / pi
        out = W_o (y / |y| + conv(v))

    where ``conv`` runs along the tokens of each head with one kernel for all of its channels. In the backward pass b is
    a clamp to 0 and 1. Where `mixture` is set W and W_o are `visionmix.layers.PrimitiveMixture`. Time and memory are
    linear in the tokens. Lengths, products and sums are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim).

    Source: ShiftAddViT (You et al. 2023, arXiv 2306.06446); the share of a half and the factor 1 / pi are the first
    terms of Castling-ViT's angular kernel (You et al. 2022, arXiv 2211.10526). Its code takes the mean over the whole
    batch, so that an image's result depends on the others.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Tokens that the convolution sees, an odd number.
        mixture: Whether each token takes its projections from a dense layer or from one of shifts.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `kernel_size` is even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 9,
        mixture: bool = False,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        self.num_heads = num_heads
        linear = PrimitiveMixture if mixture else nn.Linear
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, **dd)
        shape = (kernel_size, 1)
        self.conv = nn.Conv2d(
            num_heads, num_heads, shape, padding=(kernel_size // 2, 0), groups=num_heads, bias=False, **dd
        )
        self.proj = linear(dim, dim, **dd)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        local = self.conv(qkv[2])
        q, k, v = at_least_float32(qkv).unbind(0)
        q, k = _binary(F.normalize(q, dim=-1)), _binary(F.normalize(k, dim=-1))
        # All of y over the number of tokens, which its length does not see, so that autocast's products are means.
        share = 1 / x.shape[1]
        y = 0.5 * share * v + q @ ((k * share).transpose(2, 3) @ v) / math.pi
        y = F.normalize(y.to(v.dtype), dim=-1) + local
        return self.proj(y.transpose(1, 2).flatten(2).to(local.dtype))


@torch.fx.wrap
def _binary(x: Tensor) -> Tensor:
    """Return 1 where x (batch, heads, tokens, channels) is above its mean and 0 elsewhere; see `ShiftAddAttention`."""
    passed = x.clamp(0.0, 1.0)
    return (x > x.mean(dim=[1, 2, 3], keepdim=True)).to(x.dtype) + (passed - passed.detach())
