"""Attention inside the stripes of a map, vertical and horizontal ones: CSWin's mixer."""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.fx
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.maps import pad
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention
from visionmix.scans.cells import numbered, row_and_column


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
        num_heads: Heads of both halves together; each has half of them, at least one. Half of an odd number is rounded
            down where the channels of a half allow it, else up.
        split_size: Columns or rows of a stripe, or a function that gives them for a `grid_size`; None for attention
            over the whole map by all channels, as in CSWin's last stage.
        grid_size: Rows and columns of the map that a function of it is asked for.
        qkv_bias: Whether the projection to q, k and v has a bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the result.

    Raises:
        ValueError: heads do not divide the channels they share, or `split_size` is below 1.
    """

    has_stripes: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        split_size: int | Callable[[tuple[int, int]], int] | None = 7,
        grid_size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention(attn_drop)
        self.horizontal = DotProductAttention(attn_drop)  # of its own, for hooks that read weights
        self.has_stripes = split_size is not None
        self._split_size = split_size
        self.set_grid_size(grid_size)
        halves = 2 if self.has_stripes else 1
        self.heads = max(num_heads // halves, 1)
        if dim % (halves * self.heads):
            self.heads = (num_heads + halves - 1) // halves
        if dim % (halves * self.heads):
            shared = f"the {dim // 2} channels of a half in {self.heads} heads" if self.has_stripes else f"dim={dim}"
            raise ValueError(f"num_heads={num_heads} does not divide {shared}; give another number")
        if self.has_stripes and self.split_size < 1:
            raise ValueError(f"split_size={self.split_size} is too small; give 1 or more, or None for the whole map")
        width = dim // halves
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, **dd)
        if self.has_stripes:
            self.horizontal_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Make the stripes those of a model built for maps of `grid_size`."""
        if self.has_stripes:
            self.split_size = self._split_size(grid_size) if callable(self._split_size) else self._split_size
        else:
            self.split_size = 0

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        if self.has_stripes:
            size = self.split_size
            left, right = qkv.chunk(2, dim=-1)
            before, behind = _padding(width, size)
            cells = pad(left, [0, 0, 0, 0, before, behind])
            vertical = self._attend_in_stripes(cells, size, width, False)
            vertical = vertical + _between(self.conv(_separated_values(cells, size)), size, width)
            # Horizontal stripes are vertical ones of the transposed map, but for their convolution.
            before, behind = _padding(height, size)
            cells = pad(right, [0, 0, 0, 0, 0, 0, before, behind]).transpose(1, 2)
            horizontal = self._attend_in_stripes(cells, size, height, True)
            local = self.horizontal_conv(_separated_values(cells, size).transpose(2, 3)).transpose(2, 3)
            horizontal = horizontal + _between(local, size, height)
            return self.proj_drop(self.proj(torch.cat([vertical, horizontal.transpose(1, 2)], dim=-1)))
        tokens = qkv.flatten(1, 2).unflatten(-1, (self.heads, -1))
        y = self._attend(tokens, False).flatten(2).unflatten(1, (height, width))
        local = self.conv(qkv.select(3, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(y + local))

    def _attend(self, tokens: Tensor, horizontal: bool) -> Tensor:
        """Return (batch, tokens, heads, dim): attention among `tokens`, q, k and v (batch, tokens, 3, heads, dim)."""
        q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        if horizontal:
            return self.horizontal(q, k, v, None, self.fused_attn).transpose(1, 2)
        return self.dot_product(q, k, v, None, self.fused_attn).transpose(1, 2)

    def _attend_in_stripes(self, cells: Tensor, size: int, columns: int, horizontal: bool) -> Tensor:
        """Return the map (batch, rows, columns, channels) of attention inside stripes of the padded one, `cells`."""
        batch, rows, padded, _, channels = cells.shape
        count = padded // size
        # Copies by index, and one axis of all cells in between: axes reshaped otherwise would be copied by a compiled
        # graph only where there are several stripes, so that it would serve no other sizes. Nor would it if stripes and
        # images, with as many axes behind them, were compared.
        stripes = cells.flatten(1, 2).index_select(1, _stripe_order(rows, count, size, cells)).flatten(0, 1)
        stripes = stripes.view(-1, rows * size, 3, self.heads, channels // self.heads)
        y = self._attend(stripes, horizontal).contiguous()
        y = y.view(-1, channels).view(batch, -1, channels)
        return y.index_select(1, _cell_order(rows, count, size, columns, y)).unflatten(1, (rows, columns))


def _padding(cells: int, size: int) -> tuple[int, int]:
    """Return how many cells go before and behind so many, half each, for stripes of `size` to hold them."""
    missing = (cells + size - 1) // size * size - cells
    return missing // 2, missing - missing // 2


def _separated_values(cells: Tensor, size: int) -> Tensor:
    """Return v of padded maps as (batch, channels, rows, columns), with a column of zeros behind every stripe.

    So a 3x3 convolution stays inside stripes, which as images of their own would multiply the batch.
    """
    batch, rows, columns, _, _ = cells.shape
    lines = F.pad(cells.select(3, 2).flatten(0, 2).unflatten(0, (-1, size)), [0, 0, 0, 1])
    return lines.flatten(0, 1).unflatten(0, (batch, rows, columns // size * (size + 1))).permute(0, 3, 1, 2)


@torch.fx.wrap
def _stripe_order(rows: int, count: int, size: int, like: Tensor) -> Tensor:
    """Return where in a map of `count` stripes every cell of every stripe lies."""
    index = numbered(count * rows * size, like)
    line, column = row_and_column(index, size)
    stripe, row = row_and_column(line, rows)
    return (row * count + stripe) * size + column


@torch.fx.wrap
def _cell_order(rows: int, count: int, size: int, columns: int, like: Tensor) -> Tensor:
    """Return where among the stripes' cells every cell of the map that they were padded from lies."""
    row, column = row_and_column(numbered(rows * columns, like), columns)
    stripe, column = row_and_column(column + (count * size - columns) // 2, size)
    return (stripe * rows + row) * size + column


@torch.fx.wrap
def _between(local: Tensor, size: int, columns: int) -> Tensor:
    """Return `local`, shaped as `_separated_values`, as (batch, rows, columns, channels) without what was put there."""
    missing = local.shape[3] // (size + 1) * size - columns
    column = numbered(columns, local) + missing // 2
    return local.permute(0, 2, 3, 1).index_select(2, column // size + column)
