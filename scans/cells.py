"""Cells of a grid, numbered in row-major order."""

from torch import Tensor


def row_and_column(cell: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each cell ``row * width + column``."""
    row = cell // width
    # Not cell % width: PyTorch's ONNX exporter translates no remainder by a size that is a symbol.
    return row, cell - row * width
