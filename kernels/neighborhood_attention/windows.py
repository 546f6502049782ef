"""Which keys a query sees along one axis, and how many pairs that makes on a map."""

import itertools
import math
from bisect import bisect_right
from functools import cache


@cache
def axis_window(
    length: int, kernel_size: int, stride: int, is_causal: bool, circular: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (starts, stops): query i of a residue class of `length` tokens sees its keys `starts[i] <= j < stops[i]`.

    Queries come in groups of `stride`, which share the window of their leader: the centre of the group, the right one
    of two, or the last query where the axis is causal. A window that would leave the axis is shifted inside, except a
    causal or a circular one, which is cut.
    """
    starts, stops = [], []
    for i in range(length):
        if circular:
            start, stop = i - kernel_size // 2, i + kernel_size // 2 + 1
        elif is_causal:
            leader = min(i // stride * stride + stride - 1, length - 1)
            start, stop = leader - kernel_size + 1, length
        else:
            leader = min(i // stride * stride + stride // 2, length - 1)
            start = max(0, min(leader - kernel_size // 2, length - kernel_size))
            stop = start + kernel_size
        starts.append(max(start, 0))
        stops.append(min(stop, length, i + 1 if is_causal else length))
    return tuple(starts), tuple(stops)


def class_lengths(size: int, dilation: int) -> list[int]:
    """Return the number of tokens in each residue class of an axis; there are min(size, dilation) that hold any."""
    return [len(range(residue, size, dilation)) for residue in range(min(size, dilation))]


@cache
def box_widths(
    size: int, kernel_size: int, stride: int, dilation: int, causal: bool, circular: bool, tile: int, inverse: bool
) -> tuple[int, ...]:
    """Return along an axis, for each tile of queries, the number of keys that it sees; `inverse`: keys and queries."""
    widths = []
    for length in class_lengths(size, dilation):
        starts, stops = axis_window(length, kernel_size, stride, causal, circular)
        for first in range(0, length, tile):
            last = min(first + tile, length) - 1
            if inverse:
                # Starts and stops never fall from one query to the next.
                widths.append(bisect_right(starts, last) - bisect_right(stops, first))
            else:
                widths.append(stops[last] - starts[first])
    return tuple(widths)


def in_ellipsoid(offsets: tuple[int, ...], kernel_size: tuple[int, ...]) -> bool:
    """Return whether a key `offsets` steps away lies inside the circular window: sum (2 o / (k + 1))^2 < 1."""
    radii = [(k + 1) // 2 for k in kernel_size]
    whole = math.prod(radii) ** 2
    return sum((o * (math.prod(radii) // r)) ** 2 for o, r in zip(offsets, radii, strict=True)) < whole


@cache
def count_pairs(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    circular: bool,
) -> int:
    """Return the number of (query, key) pairs on a map."""
    if not circular:
        pairs = 1
        for n, k, s, d, causal in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
            windows = [axis_window(length, k, s, causal, False) for length in class_lengths(n, d)]
            pairs *= sum(sum(stops) - sum(starts) for starts, stops in windows)
        return pairs
    reaches = [range(-(k // 2), 1 if causal else k // 2 + 1) for k, causal in zip(kernel_size, is_causal, strict=True)]
    return sum(
        math.prod(max(0, n - abs(o) * d) for n, o, d in zip(grid, offsets, dilation, strict=True))
        for offsets in itertools.product(*reaches)
        if in_ellipsoid(offsets, kernel_size)
    )
