"""Cells of a grid, numbered in row-major order."""

import torch
from torch import Tensor


def numbered(count: int, like: Tensor) -> Tensor:
    """Return 0 to count - 1, int64 (count,), on the device of `like`, for indices that are computed in a graph.

    Sums of 0, 1, 1, ... so that they are data to Inductor. It takes indices that are computed from `torch.arange` for
    expressions of the sizes, and where sizes are symbols SymPy spends half an hour on those of a few windows, or fails.
    """
    return torch.arange(count, device=like.device).clamp(max=1).cumsum(0)


def row_and_column(cell: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each cell ``row * width + column``."""
    row = cell // width
    # Not cell % width: PyTorch's ONNX exporter translates no remainder by a size that is a symbol.
    return row, cell - row * width
