"""Attention to a smaller map: PVT's mixer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, use_fused_attn
from torch import Tensor, nn

from visionmix.layers.fold import fold_behind
from visionmix.layers.maps import channels_first, pad_to
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads

_NORM = partial(LayerNorm, eps=1e-5)


@register_mixer("spatial_reduction")
class SpatialReductionAttention(nn.Module):
    """Softmax attention of every cell to those of a smaller map, each of which stands for a square of cells.

        q    = W_q x
        k, v = W_kv norm(conv(x)), with kernel and stride sr_ratio
        out  = W_o softmax(q k^T * head_dim^-0.5) v

    Rows and columns beyond the last whole square have queries, but make no keys; a map smaller than a square is padded
    to one with zeros, at the bottom and on the right.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: PVT (Wang et al. 2021, arXiv 2102.12122).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        sr_ratio: Rows and columns of cells that a cell of the smaller map stands for.
        qkv_bias: Whether W_q and W_kv have biases.
        norm_layer: Makes the norm of the smaller map from `dim`.
        qk_dim: Channels of q and k in each head; None for those of v, head_dim.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the result.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `sr_ratio` or `qk_dim` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        sr_ratio: int = 2,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.Module] = _NORM,
        qk_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio={sr_ratio} is too small; give 1 or more")
        if qk_dim is not None and qk_dim < 1:
            raise ValueError(f"qk_dim={qk_dim} is too small; give 1 or more, or None for the width of a head")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention(attn_drop)
        keys = dim if qk_dim is None else num_heads * qk_dim
        self.widths = [keys, dim]
        self.q = nn.Linear(dim, keys, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd)
        self.norm = norm_layer(dim, **dd)
        self.sr_kv = nn.Linear(dim, keys + dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the convolution before it, for inference."""
        self.norm = fold_behind(self.sr, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        smaller = self.norm(self.sr(channels_first(pad_to(x, self.sr_ratio))).permute(0, 2, 3, 1))
        k, v = self.sr_kv(smaller).split(self.widths, dim=-1)
        y = self.dot_product(self._heads(self.q(x)), self._heads(k), self._heads(v), None, self.fused_attn)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (height, width))))

    def _heads(self, x: Tensor) -> Tensor:
        """Return a map (batch, height, width, channels) as (batch, heads, cells, channels of a head)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@register_mixer("strip")
class StripAttention(SpatialReductionAttention):
    """`SpatialReductionAttention` whose queries and keys have one channel a head, so that each is a strip of numbers.

    Without a smaller map, at `sr_ratio` 1, keys and values come from x itself. Shapes and errors are those of
    `SpatialReductionAttention`.

    Source: S2AFormer (Xu et al. 2025, arXiv 2505.22195). It reduces keys and values in space by a convolution, and
    compresses the channels of queries and keys; that they become one a head is from the authors' strip cross-attention
    (Xu et al. 2024, arXiv 2411.17061).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        sr_ratio: Rows and columns of cells that a cell of the smaller map stands for.
        qkv_bias: Whether the projections to q, k and v have biases.
        norm_layer: Makes the norm of the smaller map from `dim`.
        qk_dim: Channels of q and k in each head.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        sr_ratio: int = 2,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.Module] = _NORM,
        qk_dim: int = 1,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, sr_ratio, qkv_bias, norm_layer, qk_dim, **dd)
        if sr_ratio == 1:
            self.sr, self.norm = nn.Identity(), nn.Identity()
