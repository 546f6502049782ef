"""Softmax attention inside windows, shifted or not: Swin's mixer."""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.fx
from timm.layers import resize_rel_pos_bias_table, trunc_normal_, use_fused_attn
from torch import Tensor, nn

from visionmix.layers import pad
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads
from visionmix.scans.cells import numbered, row_and_column


@register_mixer("window")
class WindowAttention(nn.Module):
    """Multi-head softmax attention inside square windows, with a learned bias of relative position.

    ``out = W_o softmax(q k^T * head_dim^-0.5 + B) v`` with ``q, k, v = W x`` among the cells of a window, where B has
    an entry a head and offset between two cells; it is 0 without `relative_bias`. With `shift` the map is rolled by
    half a window before it is cut, and cells that the roll made neighbours do not see each other.

    A map that windows do not cover is padded with zeros at the bottom and on the right. Attention sees the padding, as
    Swin's code has it for detection. A window larger than the built map shrinks to its shorter side; where a window is
    as large as that, nothing is shifted.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Swin (Liu et al. 2021, arXiv 2103.14030).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        window_size: Rows and columns of a window, or a function that gives them for a `grid_size`.
        shift: Whether windows are shifted by half their size.
        qkv_bias: Whether the projection to q, k and v has a bias.
        grid_size: Rows and columns of the built map; None for one that is larger than a window.
        relative_bias: Whether there is a bias of relative position.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the result.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `window_size` is below 1.
    """

    undecayed = ("bias_table",)
    has_bias: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        window_size: int | Callable[[tuple[int, int]], int] = 7,
        shift: bool = False,
        qkv_bias: bool = True,
        grid_size: tuple[int, int] | None = None,
        relative_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if callable(window_size) and grid_size is None:
            raise ValueError(f"window_size={window_size!r} is a function of grid_size, which is None; give both")
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention(attn_drop)
        self.window_size = window_size
        self.shift = shift
        self.side, self.shift_size = self._side_and_shift(grid_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.has_bias = relative_bias
        if relative_bias:
            table = trunc_normal_(torch.zeros((2 * self.side - 1) ** 2, num_heads, **dd), std=0.02)
            self.bias_table = nn.Parameter(table)

    @torch.jit.ignore
    def _side_and_shift(self, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        fixed = self.window_size if grid_size is None or not callable(self.window_size) else self.window_size(grid_size)
        if fixed < 1:
            raise ValueError(f"window_size={fixed} is too small; give 1 or more")
        if grid_size is not None and min(grid_size) <= fixed:
            return min(grid_size), 0
        return fixed, fixed // 2 if self.shift else 0

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        side, shift, cells = self.side, self.shift_size, self.side * self.side
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        x = self.qkv(into_windows(x, side, shift)).flatten(0, 1)
        q, k, v = x.reshape(-1, cells, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = torch.jit.annotate(Tensor | None, None)
        if self.has_bias:
            bias = self._relative_bias()
        if shift > 0:
            # Written out, with an axis of windows, so that the mask is not repeated for every image.
            q, k, v = [each.unflatten(0, (batch, rows * columns)) for each in (q, k, v)]
            mask = _apart(rows, columns, side, shift, x).unsqueeze(1)
            x = self.dot_product(q, k, v, mask if bias is None else bias + mask, False)
        else:
            x = self.dot_product(q, k, v, bias, self.fused_attn)
        # By way of all cells: a graph that compared the windows of all images with the images would be made anew where
        # an image is one window.
        x = x.transpose(-3, -2).contiguous().view(-1, dim).view(batch, -1, dim)
        return self.proj_drop(self.proj(out_of_windows(x, height, width, side, shift)))

    def _relative_bias(self) -> Tensor:
        """Return the biases (heads, query cells, key cells) of a window."""
        side = self.side
        offsets = self.bias_table.t().contiguous().unflatten(1, (2 * side - 1, 2 * side - 1))
        # Row q of the unfolded table and row side - 1 - k within it: offset q - k; columns likewise.
        by_cell = offsets.unfold(1, side, 1).unfold(2, side, 1).flip([3, 4])
        return by_cell.reshape(self.num_heads, side * side, side * side)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Fit the window to a map of `grid_size`, and the biases to the window.

        The mixer then computes what one built for that map does. Called on such a map without this, it keeps the built
        window and pads, so that its outputs differ where the window or its shift does.
        """
        self.side, self.shift_size = self._side_and_shift(grid_size)
        if self.has_bias:
            with torch.no_grad():
                self.bias_table = nn.Parameter(self._resampled(self.bias_table))

    @torch.jit.ignore
    def fit_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a file's table of biases at the built window's size; what is none stays as it is."""
        is_table = name == "bias_table" and tensor.ndim == 2 and tensor.shape[1] == self.num_heads
        return self._resampled(tensor) if is_table else tensor

    @torch.jit.ignore
    def _resampled(self, table: Tensor) -> Tensor:
        shape = ((2 * self.side - 1) ** 2, self.num_heads)
        return resize_rel_pos_bias_table(table, (self.side, self.side), shape)


def into_windows(x: Tensor, side: int, shift: int = 0) -> Tensor:
    """Return the cells of a map (batch, height, width, dim) window by window: (batch, windows * side * side, dim).

    Windows follow in row-major order, as do the cells of each. The map is padded with zeros at the bottom and on the
    right until windows of `side` rows and columns cover it, then rolled up and to the left by `shift`.
    """
    _, height, width, _ = x.shape
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    x = pad(x, [0, 0, 0, columns * side - width, 0, rows * side - height]).flatten(1, 2)
    # One copy rolls the map and cuts it, another undoes both and crops. Reshaped axes would be copied too, by a
    # compiled graph for the sizes alone for which they have to be.
    return x.index_select(1, _window_order(rows, columns, side, shift, x))


def out_of_windows(x: Tensor, height: int, width: int, side: int, shift: int = 0) -> Tensor:
    """Return the map (batch, height, width, dim) whose cells `into_windows` gives as `x`."""
    return x.index_select(1, _cell_order(height, width, side, shift, x)).unflatten(1, (height, width))


def _rolled(rows: int, columns: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the column, in the rolled map, of every cell of every window."""
    # Lines are the `side` cells of a row of a window. No remainders: see `row_and_column`.
    cell = numbered(rows * columns * side * side, like)
    line = cell // side
    window = line // side
    window_row = window // columns
    row = line - (window - window_row) * side
    return row, cell - (line - window) * side - window_row * (columns * side)


@torch.fx.wrap
def _window_order(rows: int, columns: int, side: int, shift: int, like: Tensor) -> Tensor:
    """Return where in the padded map every cell of every window lies."""
    row, column = _rolled(rows, columns, side, like)
    height, width = rows * side, columns * side
    if shift > 0:
        row = numbered(height, like).roll(-shift).index_select(0, row)
        column = numbered(width, like).roll(-shift).index_select(0, column)
    return row * width + column


@torch.fx.wrap
def _cell_order(height: int, width: int, side: int, shift: int, like: Tensor) -> Tensor:
    """Return where among the windows' cells every cell of the map lies."""
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    by_row = _along(rows, side, side, columns * side * side, like)
    by_column = _along(columns, side, 1, side * side, like)
    if shift > 0:
        by_row, by_column = by_row.roll(shift), by_column.roll(shift)
    row, column = row_and_column(numbered(height * width, like), width)
    return by_row.index_select(0, row) + by_column.index_select(0, column)


def _along(windows: int, side: int, step: int, window_step: int, like: Tensor) -> Tensor:
    """Return ``window * window_step + place * step`` for each place of each window along an axis."""
    place = numbered(windows * side, like)
    return place // side * (window_step - side * step) + place * step


@torch.fx.wrap
def _apart(rows: int, columns: int, side: int, shift: int, like: Tensor) -> Tensor:
    """Return (windows, query cells, key cells): -100 between those that a roll made neighbours, else 0.

    A roll by `shift` puts the map's first rows and columns behind its last, so only windows at the bottom and on the
    right hold cells of both ends.
    """
    row, column = _rolled(rows, columns, side, like)
    part = 2 * (row >= rows * side - shift).to(torch.int32) + (column >= columns * side - shift).to(torch.int32)
    part = part.unflatten(0, (rows * columns, side * side))
    return (part.unsqueeze(2) != part.unsqueeze(1)).to(like.dtype) * -100.0  # as published
