"""Attention of channel groups, each to a summary of its own: FaViT's mixer."""

from functools import lru_cache
from typing import Any, Final

import torch
import torch.fx
from timm.layers import LayerNorm, use_fused_attn
from torch import Tensor, nn

from visionmix.graphs import may_keep
from visionmix.layers.maps import channels_first, pad_to
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention
from visionmix.scans.cells import numbered


@register_mixer("factorized")
class FactorizedAttention(nn.Module):
    """Softmax attention of groups of channels, one to a smaller map, the others to the mean of dilated windows.

    The channels are divided in the ratio 1 : 7 for `sr_ratio` 1, else 2 : 7 : 7. All groups have queries ``W_q x``. The
    first, with one head, attends as `SpatialReductionAttention` does, to ``norm(conv(x))`` with kernel and stride
    `sr_ratio`. A group of the others, with `num_heads` heads, reads its part y of ``W_p depthwise3x3(x)`` at every
    cell of a window, of dilation 1 in the first and of `sr_ratio` in the second, which moves over the map without
    overlap:

        m    = mean over the windows of y,  a cell for each place in the window
        k, v = W_kv W_m m
        out  = softmax(q k^T * head_dim^-0.5) (v + depthwise3x3(v))

    The first has the depthwise convolution of its values too. The groups' outputs, side by side, go through a last
    linear layer. Below and on the right the map is mirrored about its last row and column until windows fit; what lies
    beyond the mirrored map repeats the first row and column.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: FaViT (Qin et al. 2023, arXiv 2312.08614).

    Args:
        dim: Channels, a multiple of 8, or of 16 where `sr_ratio` is not 1.
        num_heads: Heads of every group but the first; a divisor of its width.
        sr_ratio: Rows and columns of cells that a cell of the smaller map stands for, and the second dilation.
        window_size: Rows and columns of cells of a window.
        qkv_bias: Whether the projections to q, k, v and m have biases.
        published_mean: Whether means are taken as in the published code, where they mix channels with windows: for
            each head and place the values, ordered by window and then by channel, are cut into as many runs as the
            head has channels, whose means take the channels' places. The published accuracies come of these.

    Raises:
        ValueError: the groups do not divide `dim`, `num_heads` does not divide their widths, or `sr_ratio` or
            `window_size` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        sr_ratio: int = 1,
        window_size: int = 7,
        qkv_bias: bool = True,
        published_mean: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        for name, value in (("sr_ratio", sr_ratio), ("window_size", window_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        shares = [1, 7] if sr_ratio == 1 else [2, 7, 7]
        if dim % sum(shares):
            raise ValueError(f"dim={dim} cannot be divided in the ratio {shares}; give a multiple of {sum(shares)}")
        first, width = (dim // sum(shares) * share for share in shares[:2])
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide a group's {width} channels; give a divisor")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.widths = [first, dim - first]
        self.group_widths = [width] * (len(shares) - 1)
        self.head_widths = [width // num_heads] * (len(shares) - 1)
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(first, first, sr_ratio, stride=sr_ratio, **dd)
        self.sr_norm = LayerNorm(first, eps=1e-5, **dd)
        self.sr_kv = nn.Linear(first, 2 * first, bias=qkv_bias, **dd)
        self.lepe = _depthwise(first, **dd)
        self.local_conv = _depthwise(dim - first, **dd)
        self.local_proj = nn.Linear(dim - first, dim - first, **dd)
        options = {"window_size": window_size, "qkv_bias": qkv_bias, "published_mean": published_mean, **dd}
        self.groups = nn.ModuleList(
            [_WindowGroup(width, num_heads, dilation, **options) for dilation in (1, sr_ratio)[: len(shares) - 1]]
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        far, near = self.query(x).flatten(1, 2).split(self.widths, dim=-1)
        x, around = x.split(self.widths, dim=-1)
        smaller = self.sr_norm(self.sr(channels_first(pad_to(x, self.sr_ratio))).permute(0, 2, 3, 1))
        k, v = self.sr_kv(smaller).chunk(2, dim=-1)
        v = v + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        k, v = k.flatten(1, 2).unsqueeze(1), v.flatten(1, 2).unsqueeze(1)
        outs = [self.dot_product(far.unsqueeze(1), k, v, None, self.fused_attn).squeeze(1)]
        y = self.local_proj(self.local_conv(around.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        queries = near.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(self.head_widths, dim=-1)
        parts = y.split(self.group_widths, dim=-1)
        for number, group in enumerate(self.groups):
            outs.append(group(queries[number], parts[number]))
        return self.proj(torch.cat(outs, dim=-1)).unflatten(1, (height, width))


class _WindowGroup(nn.Module):
    """Attention of q (batch, heads, tokens, head_dim) to the mean of the windows of a map (batch, height, width, dim).

    Returns (batch, tokens, dim).
    """

    published_mean: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dilation: int,
        window_size: int,
        qkv_bias: bool,
        published_mean: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.dilation = dilation
        self.window_size = window_size
        self.published_mean = published_mean
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.fc = nn.Linear(self.head_dim, self.head_dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(self.head_dim, 2 * self.head_dim, bias=qkv_bias, **dd)
        self.lepe = _depthwise(dim, **dd)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        side = self.window_size
        k, v = self.kv(self.fc(self._mean(x))).chunk(2, dim=-1)
        cells = v.transpose(2, 3).flatten(1, 2).unflatten(2, (side, side))
        v = v + self.lepe(cells).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        return self.dot_product(q, k, v, None, self.fused_attn).transpose(1, 2).flatten(2)

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean of all windows (batch, heads, window_size^2, head_dim)."""
        cells, average = _windows_of(x, self.window_size, self.dilation, self.head_dim, self.published_mean)
        x = x.flatten(1, 2).index_select(1, cells).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return torch.matmul(x.flatten(2).unflatten(2, (self.window_size * self.window_size, -1)), average)


def _depthwise(dim: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)


@torch.fx.wrap
def _windows_of(x: Tensor, side: int, dilation: int, channels: int, published: bool) -> tuple[Tensor, Tensor]:
    """Return the cells of x that stand in each place of the windows, and the matrix that takes the mean over windows.

    Shapes: int64 (places * windows,), window after window for each place, and (windows * channels, channels).
    """
    if not torch.jit.is_scripting():
        if may_keep(x):
            return _kept_windows(x.shape[1], x.shape[2], x.dtype, side, dilation, channels, published)
    return _windows(x.shape[1], x.shape[2], x, side, dilation, channels, published)


@lru_cache(maxsize=16)
def _kept_windows(height: int, width: int, dtype: torch.dtype, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return _windows(height, width, torch.empty(0, dtype=dtype, device="cpu"), *options)


def _windows(
    height: int, width: int, like: Tensor, side: int, dilation: int, channels: int, published: bool
) -> tuple[Tensor, Tensor]:
    # No axis has a window an entry: graphs of all sizes would be made anew where a map is one window.
    span = dilation * (side - 1) + 1
    rows, columns = (height + span - 1) // span, (width + span - 1) // span
    count = rows * columns
    entry = numbered(side * side * count, like)
    place = entry // count
    window = entry - place * count
    down, window_row = place // side, window // columns
    row = _mirrored(window_row * span + down * dilation, height)
    column = _mirrored((window - window_row * columns) * span + (place - down * side) * dilation, width)
    value = numbered(count * channels, like)
    becomes = value // count if published else value - value // channels * channels
    average = becomes.unsqueeze(1) == torch.arange(channels, device=like.device)
    return row * width + column, average.to(like.dtype) / count


def _mirrored(cell: Tensor, length: int) -> Tensor:
    """Return the cells of an axis that those beyond its end stand for."""
    return torch.minimum(cell, 2 * (length - 1) - cell).clamp(min=0)
