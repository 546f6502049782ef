"""Softmax attention between the low frequencies of a map: DCT attention."""

import math
from typing import Any

import torch
import torch.fx
from timm.layers import use_fused_attn
from torch import Tensor, nn

from visionmix.layers import at_least_float32
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads


@register_mixer("dct")
class DctAttention(nn.Module):
    """Multi-head softmax attention whose tokens are the low frequencies of a discrete cosine transform.

    With D_n the first ``ceil(n / reduction)`` rows of the orthonormal DCT-II of n numbers,

        z   = D_height x D_width^T,    q, k, v = W z
        y   = softmax(q k^T * head_dim^-0.5) v
        out = W_o D_height^T y D_width + b_o

    in each channel. Higher frequencies are left out, so that attention's time and memory fall with the fourth power of
    `reduction`. The transforms are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: DCT-Former (Scribano et al. 2022, arXiv 2203.01178), on sequences; in two dimensions, the DCT attention of
    DCT-HistoTransformer (Ranjbar et al. 2024, arXiv 2410.19166).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        reduction: Rows of the map over rows of frequencies, and columns likewise; 1 for all frequencies.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `reduction` is below 1.
    """

    def __init__(self, dim: int, num_heads: int = 3, reduction: int = 2, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction={reduction} is too small; give 1 or more")
        self.num_heads = num_heads
        self.reduction = reduction
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = _bases(x.shape[1], x.shape[2], self.reduction, at_least_float32(x))
        z = _along_both(at_least_float32(x), rows, columns).to(x.dtype)
        qkv = self.qkv(z).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = self.dot_product(q, k, v, None, self.fused_attn).transpose(1, 2).flatten(2)
        y = y.unflatten(1, (rows.shape[0], columns.shape[0]))
        return self.proj(_along_both(at_least_float32(y), rows.t(), columns.t()).to(y.dtype))


@torch.fx.wrap
def _bases(height: int, width: int, reduction: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bases (frequencies, cells) of rows and of columns, in the type of `like`."""
    return _basis(height, reduction, like), _basis(width, reduction, like)


def _basis(cells: int, reduction: int, like: Tensor) -> Tensor:
    frequency = torch.arange((cells + reduction - 1) // reduction, dtype=like.dtype, device=like.device).unsqueeze(1)
    place = torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5
    waves = torch.cos(frequency * place * (math.pi / cells)) * (2 / cells) ** 0.5
    return torch.where(frequency > 0, waves, waves * 0.5**0.5)


def _along_both(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return x (batch, height, width, dim) with `rows` (new height, height) and `columns` multiplied along its axes."""
    x = torch.matmul(columns, x)
    return torch.matmul(rows, x.flatten(2)).unflatten(2, (columns.shape[0], -1))
