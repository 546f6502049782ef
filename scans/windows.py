"""Orders inside windows, and orders that sample the grid at a rate.

Each function returns the index of one order, int64 (steps,) on the CPU: the cell `row * width + column` read at each
step, -1 for a padded step.

Windows and samples are computed from the steps' numbers alone. Tensors with an axis for the windows would tie an
exported graph to maps with one window a row, or with several, since axes of length 1 decide whether a tensor's memory
is contiguous.
"""

import torch


def _cells(row: torch.Tensor, column: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the cells at the given rows and columns, -1 outside the grid."""
    return torch.where((row < height) & (column < width), row * width + column, -1)


def _windowed(height: int, width: int, size: int, rate: int = 1, *, snake: bool = False) -> torch.Tensor:
    block = size * rate
    step = torch.arange(window_steps(height, width, block), device="cpu")
    row, column = step // size % size, step % size
    if snake:
        column = torch.where(row % 2 == 0, column, size - 1 - column)
    windows = step // (size * size)
    blocks, blocks_a_row = windows // (rate * rate), (width + block - 1) // block
    down = blocks // blocks_a_row
    row = down * block + windows // rate % rate + row * rate
    column = (blocks - down * blocks_a_row) * block + windows % rate + column * rate
    return _cells(row, column, height, width)


def window(height: int, width: int, size: int) -> torch.Tensor:
    """Return windows of size x size in row-major order, row-major inside, padded at the bottom and right.

    LocalMamba's local scan (2024, arXiv:2403.09338).
    """
    return _windowed(height, width, size)


def window_snake(height: int, width: int, size: int) -> torch.Tensor:
    """Return windows of size x size in row-major order, rows in alternating direction inside, padded as `window`."""
    return _windowed(height, width, size, snake=True)


def window_steps(height: int, width: int, size: int) -> int:
    """Return the number of steps of `window` and `window_snake`, padded ones included."""
    return (height + size - 1) // size * ((width + size - 1) // size) * size * size


def atrous(height: int, width: int, rate: int) -> torch.Tensor:
    """Return all cells as rate x rate interleaved sub-grids, one after the other, each row-major.

    Sub-grid (i, j) holds the cells with row % rate == i and column % rate == j; sub-grids come row-major in (i, j).
    """
    row = torch.arange(height, device="cpu").view(-1, 1)
    column = torch.arange(width, device="cpu").view(1, -1)
    sub_grid = row % rate * rate + column % rate
    return (sub_grid * (height * width) + row * width + column).reshape(-1).argsort()


def atrous_window(height: int, width: int, size: int, rate: int) -> torch.Tensor:
    """Return windows of size x size cells that lie `rate` rows and columns apart, row-major inside.

    The grid is cut into blocks of size * rate rows and columns, row-major and padded at the bottom and right, each of
    which holds rate x rate such windows, in the row-major order of their first cells. At rate 1 it is `window`.

    The atrous windows of AtrousMamba (2025, arXiv:2507.16172), whose paper leaves the order of the windows open.
    """
    return _windowed(height, width, size, rate)


def atrous_window_steps(height: int, width: int, size: int, rate: int) -> int:
    """Return the number of steps of `atrous_window`, padded ones included."""
    return window_steps(height, width, size * rate)


def skip(height: int, width: int, rate: int, top: int, left: int) -> torch.Tensor:
    """Return only the cells (top + i * rate, left + j * rate), row-major, padded to ceil(height / rate) rows and
    ceil(width / rate) columns so that all sub-grids have equal lengths.

    EfficientVMamba's skip scan (2024, arXiv:2403.09977).
    """
    step = torch.arange(skip_steps(height, width, rate, top, left), device="cpu")
    columns = (width + rate - 1) // rate
    row = step // columns
    return _cells(top + row * rate, left + (step - row * columns) * rate, height, width)


def skip_steps(height: int, width: int, rate: int, top: int, left: int) -> int:
    """Return the number of steps of `skip`, padded ones included."""
    return (height + rate - 1) // rate * ((width + rate - 1) // rate)
