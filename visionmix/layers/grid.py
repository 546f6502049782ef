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
    prefix = sorted(grid.prefix_positions)
    starts, ends = [0, *(at + 1 for at in prefix)], [*prefix, x.shape[1]]
    cells = [x[:, start:end] for start, end in zip(starts, ends, strict=True)]
    tokens = [x[:, at : at + 1] for at in prefix]
    return torch.cat(cells, dim=1) if prefix else x, torch.cat(tokens, dim=1) if prefix else x[:, :0]
