"""Where the tokens of a plain backbone lie."""

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """What a token sequence (batch, tokens, channels) stands for.

    Attributes:
        height: Rows of the map that the image was cut into.
        width: Columns of that map.
        prefix_positions: Positions in the sequence of tokens that are no cells of the map (class tokens, registers).
        indices: Row-major cell of each remaining token, int64 (batch, tokens), or None where every cell is there, in
            row-major order.
    """

    height: int
    width: int
    prefix_positions: list[int]
    indices: Tensor | None


def split_prefix(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the cells' and the prefix tokens of a sequence (batch, tokens, channels), each in its order."""
    cells = torch.jit.annotate(list[Tensor], [])
    prefix = torch.jit.annotate(list[Tensor], [])
    start = 0
    for at in sorted(grid.prefix_positions):
        cells.append(x[:, start:at])
        prefix.append(x[:, at : at + 1])
        start = at + 1
    cells.append(x[:, start:])
    if len(prefix) == 0:
        return x, x[:, :0]
    return torch.cat(cells, dim=1), torch.cat(prefix, dim=1)


def join_prefix(cells: Tensor, prefix: Tensor, grid: Grid) -> Tensor:
    """Return the sequence (batch, tokens, channels) of which `split_prefix` gives `cells` and `prefix`."""
    parts = torch.jit.annotate(list[Tensor], [])
    start = 0
    for index, at in enumerate(sorted(grid.prefix_positions)):
        parts.append(cells[:, start : at - index])
        parts.append(prefix[:, index : index + 1])
        start = at - index
    parts.append(cells[:, start:])
    return torch.cat(parts, dim=1) if len(parts) > 1 else cells
