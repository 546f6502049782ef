"""Attention inside the stripes of a map, vertical and horizontal ones: CSWin's mixer."""

from typing import Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.mixers.registry import register_mixer


@register_mixer("cross_window")
class CrossWindowAttention(nn.Module):
    """Softmax attention inside stripes: half of the channels in vertical ones, half in horizontal ones.

    With ``q, k, v = W x``, split in halves, for each half and each stripe of it

        y   = softmax(q k^T * head_dim^-0.5) v + depthwise3x3(v)
        out = W_o [y of vertical stripes, y of horizontal stripes]

    where the convolution (LePE) sees zeros beyond the stripe. A stripe is `split_size` columns, or rows, over the whole
    height, or width. A map that stripes do not divide is padded by cells whose q, k and v are zero, half of them on
    each side; they are attended to, as in CSWin's code for segmentation.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: CSWin (Dong et al. 2021, arXiv 2107.00652).

    Args:
        dim: Channels; an even number where there are stripes.
        num_heads: Heads of both halves together; each has half of them, and at least one.
        split_size: Columns or rows of a stripe; None for attention over the whole map by all channels, as in CSWin's
            last stage.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: heads do not divide the channels they share, or `split_size` is below 1.
    """

    has_stripes: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        split_size: int | None = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.has_stripes = split_size is not None
        self.split_size = 0 if split_size is None else split_size
        halves = 2 if self.has_stripes else 1
        self.heads = max(num_heads // halves, 1)
        if dim % (halves * self.heads):
            shared = f"the {dim // 2} channels of a half in {self.heads} heads" if self.has_stripes else f"dim={dim}"
            raise ValueError(f"num_heads={num_heads} does not divide {shared}; give another number")
        if self.has_stripes and self.split_size < 1:
            raise ValueError(f"split_size={split_size} is too small; give 1 or more, or None for the whole map")
        dd = {"device": device, "dtype": dtype}
        width = dim // halves
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, **dd)
        if self.has_stripes:
            self.horizontal_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        if self.has_stripes:
            left, right = qkv.chunk(2, dim=-1)
            vertical, horizontal = _cut(left, height, self.split_size), _cut(right, self.split_size, width)
            columns = _attend(vertical, self.conv(_values(vertical)), self.heads, height, width)
            rows = _attend(horizontal, self.horizontal_conv(_values(horizontal)), self.heads, height, width)
            return self.proj(torch.cat([columns, rows], dim=-1))
        whole = _cut(qkv, height, width)
        return self.proj(_attend(whole, self.conv(_values(whole)), self.heads, height, width))


def _cut(qkv: Tensor, rows: int, columns: int) -> Tensor:
    """Return a map (batch, height, width, 3, channels) as windows (batch, down, across, rows, columns, 3, channels)."""
    batch, height, width, _, channels = qkv.shape
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    above, below = _halves(down * rows - height)
    left, right = _halves(across * columns - width)
    qkv = _pad(qkv, [0, 0, 0, 0, left, right, above, below])
    return qkv.reshape(batch, down, rows, across, columns, 3, channels).transpose(2, 3)


def _values(windows: Tensor) -> Tensor:
    """Return v of windows as maps (windows, channels, rows, columns)."""
    return windows.select(5, 2).flatten(0, 2).permute(0, 3, 1, 2)


def _attend(windows: Tensor, local: Tensor, heads: int, height: int, width: int) -> Tensor:
    """Return what attention inside windows gives, and `local` besides, as a map (batch, height, width, channels)."""
    batch, down, across, rows, columns, _, channels = windows.shape
    qkv = windows.reshape(batch * down * across, rows * columns, 3, heads, channels // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, rows, columns, channels)
    y = (y + local.permute(0, 2, 3, 1)).reshape(batch, down, across, rows, columns, channels).transpose(2, 3)
    y = y.reshape(batch, down * rows, across * columns, channels)
    top, left = (down * rows - height) // 2, (across * columns - width) // 2
    return y[:, top : top + height, left : left + width]


def _halves(cells: int) -> tuple[int, int]:
    return cells // 2, cells - cells // 2


@torch.fx.wrap
def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    """Return `torch.nn.functional.pad(x, amounts)`, or x itself where there is nothing to pad."""
    # A compiled graph pads always: a branch on the size would compile once more.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if sum(amounts) == 0:
            return x
    return F.pad(x, amounts)
