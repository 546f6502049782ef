"""Where the tokens of a plain backbone lie."""

from typing import NamedTuple

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
