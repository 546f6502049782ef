"""FMViT's mixers: convolutions for high frequencies, and attention to a smaller map for low ones."""

from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn

from visionmix.layers.maps import pool_map
from visionmix.layers.multi_group import MultiGroupConv
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention

_GROUPS = (8, 16)


@register_mixer("multi_group")
class MultiGroupMixer(nn.Module):
    """``W act(conv3x3(x))``, both convolutions trained as several: see `visionmix.layers.multi_group`.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: the convolutional fusion block of FMViT (Tan et al. 2023, arXiv 2311.05707). From the paper is that such
    convolutions mix the tokens; their sizes and groups are decided here.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel; an odd number.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(self, dim: int, kernel_size: int = 3, **dd: Any) -> None:
        super().__init__()
        self.conv = MultiGroupConv(dim, dim, kernel_size, _GROUPS, **dd)
        self.act = nn.ReLU()
        self.proj = MultiGroupConv(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.conv(x)))


@register_mixer("multi_frequency")
class MultiFrequencyMixer(nn.Module):
    """Convolutions of some channels, h, for high frequencies, and attention of the others, l, for low ones.

        q, k, v = W_q l, W_kv pool(l)
        out     = W [act(conv3x3(h)), softmax(q k^T * head_dim^-0.5) v]

    pool averages squares of `sr_ratio` cells a side; where they do not fit, windows of adaptive pooling, as many as
    squares would cover the map. All convolutions and projections are trained as several: see
    `visionmix.layers.multi_group`.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: the multi-frequency mixing block of FMViT (Tan et al. 2023, arXiv 2311.05707). From the paper are the two
    parts, re-parameterised convolutions and light-weight attention; the share of the channels and the sizes are decided
    here.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of the channels of low frequencies.
        sr_ratio: Rows and columns of cells that a key stands for.
        high: Share of the channels, rounded down, that stand for high frequencies.

    Raises:
        ValueError: `num_heads` does not divide the channels that are left, `sr_ratio` is below 1, or `high` leaves one
            of the parts without a channel.
    """

    def __init__(self, dim: int, num_heads: int = 3, sr_ratio: int = 2, high: float = 0.25, **dd: Any) -> None:
        super().__init__()
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio={sr_ratio} is too small; give 1 or more")
        above = int(dim * high)
        below = dim - above
        if not 0 < above < dim:
            raise ValueError(f"high={high} makes {above} of {dim} channels; give a share that leaves both parts some")
        if num_heads < 1 or below % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {below} channels of low frequencies")
        self.parts = [above, below]
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.conv = MultiGroupConv(above, above, 3, _GROUPS, **dd)
        self.act = nn.ReLU()
        self.q = MultiGroupConv(below, below, **dd)
        self.kv = MultiGroupConv(below, 2 * below, **dd)
        self.proj = MultiGroupConv(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        high, low = x.split(self.parts, dim=-1)
        k, v = self.kv(self._pooled(low)).chunk(2, dim=-1)
        y = self.dot_product(self._heads(self.q(low)), self._heads(k), self._heads(v), None, self.fused_attn)
        y = y.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj(torch.cat([self.act(self.conv(high)), y], dim=-1))

    def _pooled(self, x: Tensor) -> Tensor:
        if self.sr_ratio == 1:
            return x
        rows, columns = x.shape[1] + self.sr_ratio - 1, x.shape[2] + self.sr_ratio - 1
        return pool_map(x, rows // self.sr_ratio, columns // self.sr_ratio)

    def _heads(self, x: Tensor) -> Tensor:
        """Return a map (batch, height, width, channels) as (batch, heads, cells, channels of a head)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
