"""Sets of directions, as published models read a map several times over."""

import torch

from visionmix.registry import close_matches
from visionmix.scans.cells import row_and_column
from visionmix.scans.grammar import check_name, check_sizes, parse
from visionmix.scans.orders import ScanOrder, order


def _routes(name: str) -> tuple[str, ...]:
    return name, f"{name}_transposed", f"{name}_reversed", f"{name}_transposed_reversed"


def _both_ways(*names: str) -> tuple[str, ...]:
    return tuple(direction for name in names for direction in (name, f"{name}_reversed"))


SETS = {
    # Vim (2024, arXiv:2401.09417), ViG (2024, arXiv:2405.18425)
    "bidirectional": ("raster", "raster_reversed"),
    # VMamba (2024, arXiv:2401.10166), and what replaces its four directions in its ablations
    "cross": _routes("raster"),
    "vmamba_bidirectional": ("raster", "raster", "raster_reversed", "raster_reversed"),
    "vmamba_unidirectional": ("raster",) * 4,
    # EfficientVMamba (2024, arXiv:2403.09977): every cell in one of the four only
    "efficientvmamba": ("skip_2_0_0", "skip_2_0_1_transposed", "skip_2_0_1", "skip_2_1_1_transposed"),
    # LaMamba-Diff (2024, arXiv:2408.02615): continuous row snakes from two corners, column snakes from the bottom ones
    "lamamba": ("snake", "snake_vflip", "snake_transposed_vflip", "snake_transposed_hflip_vflip"),
    # LocalMamba (2024, arXiv:2403.09338): h, v, w2 and w7 with their flips; each layer takes three or four of them
    "localmamba": _both_ways("raster", "column", "window_2", "window_7"),
    # MHS-VM (2024, arXiv:2406.05992): four heads (C, X, S, Z) of four routes each, head by head
    "mhs_vm": _both_ways(
        "snake", "snake_transposed", "zigzag", "zigzag_hflip", "spiral", "spiral_vflip", "raster", "raster_transposed"
    ),
    # MSVMamba (2024, arXiv:2405.14174): the half-resolution map, read three times in one sequence
    "msvmamba_lowres": ("raster_reversed+raster_transposed+raster_transposed_reversed",),
    # OccMamba (2024, arXiv:2408.09859): xy, yx and both from the far corner
    "occmamba": ("u_order", "u_order_transposed", "u_order_hflip_vflip", "u_order_transposed_hflip_vflip"),
    # PlainMamba (2024, arXiv:2403.17695): continuous row and column snakes, and back; see move_codes
    "plainmamba": ("snake", "snake_reversed", "snake_transposed", "snake_transposed_reversed"),
    "unidirectional": ("raster",),
}


def direction_sets() -> list[str]:
    """Return the names of the published direction sets."""
    return sorted(SETS)


def direction_names(name: str) -> tuple[str, ...]:
    """Return the names of the orders of a direction set, each as `order` takes it.

    Args:
        name: one of `direction_sets()`, or any order's name, whose set is the order, its transpose and the reverses of
            both: "cross" and "raster" are the same.

    Raises:
        TypeError: the name is not a str.
        ValueError: there is no such set or order, or it is a joined sequence ("a+b").
    """
    check_name(name)
    if name in SETS:
        return SETS[name]
    try:
        parts = parse(name)
    except ValueError as error:
        close = close_matches(name, SETS)
        hint = f"did you mean {close[0]!r}?" if close else "scans.direction_sets() lists them"
        raise ValueError(f"no direction set is called {name!r} ({hint}); as an order: {error}") from None
    if len(parts) > 1:
        raise ValueError(f"{name!r} is one sequence of joined orders; give the set of directions of one of its parts")
    return _routes(name)


def directions(
    name: str, height: int, width: int, depth: int = 1, *, device: torch.device | str | None = None
) -> list[ScanOrder]:
    """Return the orders of a direction set: those that `direction_names(name)` lists, of one grid.

    Arguments and errors are those of `direction_names` and `order`.
    """
    return [order(direction, height, width, depth, device=device) for direction in direction_names(name)]


def move_codes(index: torch.Tensor, width: int) -> torch.Tensor:
    """Return the code of the move that led into each step: 1 right, 2 left, 3 up, 4 down, 0 start.

    PlainMamba (2024, arXiv:2403.17695) adds a learned vector for each code to its scan. A step that is not a move to
    one of the 4 neighbours has code 0, like padded steps and the steps after them.

    Args:
        index: an order's index, int64 (steps,).
        width: the grid's width in cells.

    Returns:
        int64 (steps,), on the index's device.

    Raises:
        TypeError: `index` is no tensor of int64, or `width` no int.
        ValueError: `width` is below 1.
    """
    if not torch.jit.is_scripting():  # TorchScript has checked the types, and cannot compile these lines
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
            kind = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"index is {kind}; give order(...).index, of int64")
        check_sizes(width=width)
    row, column = row_and_column(index, width)
    down, right = row.diff(), column.diff()
    # Rows differ by one or columns do, never both; the number of the move follows from its sign.
    code = torch.where(right.abs() + down.abs() == 1, (3 - right) // 2 * right.abs() + (7 + down) // 2 * down.abs(), 0)
    code = torch.where((index[1:] < 0) | (index[:-1] < 0), 0, code)
    return torch.cat([code.new_zeros(1), code])
