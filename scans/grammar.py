"""The names of scan orders: which exist, and how one is read.

    name      = part {"+" part}                      parts joined with + are read one after the other, as one sequence
    part      = base {"_" number} {"_" modifier}     "hilbert", "window_7", "window_snake_7_transposed_reversed"
    modifier  = transposed | hflip | vflip | reversed, applied from left to right, any number of them

`transposed` is the base's order on the transposed grid (rows for columns), `hflip` mirrors it left to right, `vflip`
top to bottom, and `reversed` reads it from its last step, padding included, to its first.
"""

import functools
import re
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch

from visionmix.registry import close_matches
from visionmix.scans import curves, windows
from visionmix.scans.hilbert import hilbert
from visionmix.scans.order_names import split_order

MODIFIERS = ("transposed", "hflip", "vflip", "reversed")


class Base(NamedTuple):
    """A base order: its index, as a function of (height, width[, depth], *numbers), and what its name takes."""

    build: Callable[..., torch.Tensor]
    numbers: tuple[str, ...] = ()  # what the numbers in the name mean
    steps: Callable[..., int] | None = None  # None: one step per cell
    volumetric: bool = False  # takes a depth
    recursive: bool = False  # built of pieces whose number depends on the size
    self_inverse: bool = False  # the published inverse is the index itself, true or not


BASES = {
    "atrous": Base(windows.atrous, ("rate",)),
    "atrous_window": Base(windows.atrous_window, ("size", "rate"), windows.atrous_window_steps),
    "column": Base(curves.column, volumetric=True),
    # LocalMamba un-reads its column scan with the reshape of the forward pass, height and width not swapped back: the
    # inverse of square grids only. Its published weights were trained with it, at square sizes; at others it scrambles.
    "column_unswapped": Base(curves.column, self_inverse=True),
    "diagonal": Base(curves.diagonal),
    "hilbert": Base(hilbert, recursive=True),
    "morton": Base(curves.morton, volumetric=True),
    "raster": Base(curves.raster, volumetric=True),
    "skip": Base(windows.skip, ("rate", "row", "column"), windows.skip_steps),
    "snake": Base(curves.snake, volumetric=True),
    "spiral": Base(curves.spiral),
    "u_order": Base(curves.u_order, volumetric=True),
    "window": Base(windows.window, ("size",), windows.window_steps),
    "window_snake": Base(windows.window_snake, ("size",), windows.window_steps),
    "zigzag": Base(curves.zigzag),
}


class Part(NamedTuple):
    """One part of a parsed name."""

    base: Base
    numbers: tuple[int, ...]
    modifiers: tuple[str, ...]


def names() -> list[str]:
    """Return the base names that `order` takes; those of windowed and sampled orders take numbers (`window_7`).

    `atrous_<rate>`, `atrous_window_<size>_<rate>`, `skip_<rate>_<row>_<column>`, `window_<size>` and
    `window_snake_<size>`; any of them may be followed by modifiers (`MODIFIERS`).
    """
    return sorted(BASES)


def _nearest(part: str) -> str:
    """Return "; did you mean ...?" with the right name nearest to an unknown one, or "" if none is near."""
    numbers = "".join(f"_{number}" for number in re.findall(r"\d+", part))
    bases = [key + numbers if base.numbers else key for key, base in BASES.items()]
    modified = [f"{base}_{modifier}" for base in bases for modifier in MODIFIERS]
    found = close_matches(part, bases + modified, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


@functools.lru_cache(maxsize=1024)
def parse(name: str) -> tuple[Part, ...]:
    """Return the parts of an order's name; ValueError, naming the nearest right name, if there is no such order."""
    return tuple(_parse_part(part, name) for part in split_order(name))


def _parse_part(part: str, name: str) -> Part:
    words = part.split("_")
    end = len(words)
    while end and words[end - 1] in MODIFIERS:
        end -= 1
    modifiers = tuple(words[end:])
    start = end
    while start and re.fullmatch(r"[0-9]+", words[start - 1]):
        start -= 1
    numbers = tuple(int(word) for word in words[start:end])
    key = "_".join(words[:start])
    if key not in BASES:
        where = "" if part == name else f" in {name!r}"
        raise ValueError(
            f"no scan order is called {part!r}{where}{_nearest(part)} (scans.names() lists the base names)"
        )
    base = BASES[key]
    if len(numbers) != len(base.numbers):
        form = "_".join([key, *(f"<{number}>" for number in base.numbers)])
        raise ValueError(f"scan order {part!r} has {len(numbers)} number(s); {key} is written as {form}")
    for what, number in zip(base.numbers, numbers, strict=True):
        if number < 1 and what in ("rate", "size"):
            raise ValueError(f"scan order {part!r}: the {what} must be at least 1")
        if number >= 2**31:
            raise ValueError(f"scan order {part!r}: the {what} must be below 2**31; no grid is as large")
    if "row" in base.numbers and max(numbers[1:]) >= numbers[0]:
        raise ValueError(f"scan order {part!r}: row and column must be below the rate, {numbers[0]}")
    return Part(base, numbers, modifiers)


def check_name(name: str) -> None:
    """Raise TypeError if the name is not a str."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} is a {type(name).__name__}; the name of a scan order or direction set is a str")


def check_sizes(**sizes: int) -> None:
    """Raise TypeError or ValueError at the first of the `sizes` of a grid, by axis, that is no integer from 1 up."""
    for axis, size in sizes.items():
        if torch.jit.is_tracing() and isinstance(size, torch.Tensor):
            continue
        if isinstance(size, bool) or not isinstance(size, (Integral, torch.SymInt)):
            raise TypeError(f"{axis}={size!r} is a {type(size).__name__}; the grid's {axis} must be an int")
        if isinstance(size, Integral) and size < 1:
            raise ValueError(f"{axis}={size} is not a size of a grid; {axis} must be at least 1")


def check_depth(name: str, depth: int) -> None:
    """Raise ValueError if an order exists in two dimensions only and the grid has three."""
    if depth != 1 and not all(part.base.volumetric for part in parse(name)):
        volumetric = ", ".join(key for key, base in BASES.items() if base.volumetric)
        raise ValueError(f"scan order {name!r} is two-dimensional; depth={depth} needs one of {volumetric}")


def num_steps(name: str, height: int, width: int, depth: int = 1) -> int:
    """Return the number of steps of an order, padded steps included, without making it.

    Args:
        name: an order's name, as `order` takes it.
        height: rows of the grid; symbolic integers give a symbolic number, here and below.
        width: columns of the grid.
        depth: levels of the grid.

    Raises:
        TypeError: the name is not a str, or a size is not an int.
        ValueError: no order has that name, a size is below 1, or the order is two-dimensional and depth is not 1.
    """
    check_name(name)
    check_sizes(height=height, width=width, depth=depth)
    check_depth(name, depth)
    total = 0
    for part in parse(name):
        if part.base.steps is None:
            total = total + height * width * depth
        elif part.modifiers.count("transposed") % 2:
            total = total + part.base.steps(width, height, *part.numbers)
        else:
            total = total + part.base.steps(height, width, *part.numbers)
    return total
