"""Orders that read every cell of a grid exactly once, by a closed formula.

Each function returns the index of one order, int64 (height * width * depth,) on the CPU: the cell
`(row * width + column) * depth + level` read at each step.
"""

import torch


def _axes(height: int, width: int, depth: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the row, column and level of every cell, broadcastable to (height, width, depth)."""
    row = torch.arange(height, device="cpu").view(-1, 1, 1)
    column = torch.arange(width, device="cpu").view(1, -1, 1)
    level = torch.arange(depth, device="cpu").view(1, 1, -1)
    return row, column, level


def _sorted_by(code: torch.Tensor, height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the cells in ascending order of their code, which differs from cell to cell."""
    return code.expand(height, width, depth).reshape(-1).argsort()


def raster(height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the rows from top to bottom, each from left to right; levels run fastest."""
    return torch.arange(height * width * depth, device="cpu")


def column(height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the columns from left to right, each from top to bottom; levels run fastest."""
    return raster(height, width, depth).view(height, width, depth).transpose(0, 1).reshape(-1)


def snake(height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the rows in alternating direction, so that every step moves to a neighbour (boustrophedon).

    In three dimensions the levels alternate as well: each column of levels is walked up or down, whichever begins at
    the level where the one before it ended.
    """
    row, position, height_position = _axes(height, width, depth)
    column = torch.where(row % 2 == 0, position, width - 1 - position)
    level = torch.where((row * width + position) % 2 == 0, height_position, depth - 1 - height_position)
    return ((row * width + column) * depth + level).reshape(-1)


def diagonal(height: int, width: int) -> torch.Tensor:
    """Return the anti-diagonals (row + column constant) from the top-left corner, each from its top to its bottom."""
    row, column, _ = _axes(height, width)
    return _sorted_by((row + column) * height + row, height, width)


def zigzag(height: int, width: int) -> torch.Tensor:
    """Return the anti-diagonals in alternating direction, the first longer one downwards (as JPEG reads blocks)."""
    row, column, _ = _axes(height, width)
    diagonal = row + column
    return _sorted_by(diagonal * height + torch.where(diagonal % 2 == 1, row, height - 1 - row), height, width)


def spiral(height: int, width: int) -> torch.Tensor:
    """Return the clockwise spiral from the top-left corner to the middle."""
    row, column, _ = _axes(height, width)
    bottom, right = height - 1 - row, width - 1 - column
    ring = torch.minimum(torch.minimum(row, bottom), torch.minimum(column, right))
    before = height * width - (height - 2 * ring) * (width - 2 * ring)
    down, across = height - 1 - 2 * ring, width - 1 - 2 * ring  # moves along one side of this ring
    on_left = 2 * across + down + bottom - ring
    on_bottom = torch.where(bottom == ring, across + down + right - ring, on_left)
    on_right = torch.where(right == ring, across + row - ring, on_bottom)
    return _sorted_by(before + torch.where(row == ring, column - ring, on_right), height, width)


def _interleaved(*coordinates: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers whose binary digits are those of the coordinates in turn, the first one's leading."""
    code = torch.zeros((), dtype=torch.int64, device="cpu")
    for bit in reversed(range(bits)):
        for coordinate in coordinates:
            code = code * 2 + (coordinate >> bit & 1)
    return code


def _bits(*sizes: int) -> int:
    """Return the binary digits of the largest coordinate; where a size is a symbol, as many as any grid needs."""
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return 20
    return (max(sizes) - 1).bit_length()


def morton(height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the Z-order curve: cells by the interleaved binary digits of row, column and (if depth > 1) level.

    On grids whose sides are not equal powers of two, the curve of the enclosing one is walked and the cells outside the
    grid are left out (G. M. Morton, A computer oriented geodetic data base, 1966).
    """
    coordinates = _axes(height, width, depth)[: 3 if depth > 1 else 2]
    code = _interleaved(*coordinates, bits=_bits(height, width, depth))
    return _sorted_by(code, height, width, depth)


def u_order(height: int, width: int, depth: int = 1) -> torch.Tensor:
    """Return the quadrants as a U, (0, 0), (0, 1), (1, 1), (1, 0), unrotated at every scale; levels run fastest.

    This is what the released code of OccMamba (2024, arXiv:2408.09859) calls its height-prioritised 2-D Hilbert
    expansion; without the rotations of a Hilbert curve, the walk jumps between quadrants.
    """
    row, column, level = _axes(height, width, depth)
    code = _interleaved(row, row ^ column, bits=_bits(height, width))
    return _sorted_by(code * depth + level, height, width, depth)
