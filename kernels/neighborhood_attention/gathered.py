"""The products of queries with the keys of their windows, and sums of values by window, in graphs of all sizes.

Unlike `tiles`, this holds a copy of the keys and values for each query.
"""

from torch import Tensor

from visionmix.kernels.neighborhood_attention.tables import AxisTable, Tables


def products(query: Tensor, key: Tensor, tables: Tables) -> Tensor:
    """Return the products of queries (batch, *map, heads, dim) with the keys (batch, *map, key heads, dim) of their
    windows, (batch, *map, heads, window); keys beyond the map's end are zeros."""
    queries = query.unflatten(-2, (key.shape[-2], -1))
    return (queries @ _gather(key, tables.axes).transpose(-1, -2)).flatten(-3, -2)


def sums(weights: Tensor, value: Tensor, tables: Tables) -> Tensor:
    """Return the sums of the values of each window, (batch, *map, heads, dim), by weights as `products` returns."""
    grouped = weights.unflatten(-2, (value.shape[-2], -1))
    return (grouped @ _gather(value, tables.axes)).flatten(-3, -2)


def _gather(x: Tensor, windows: list[AxisTable]) -> Tensor:
    """(batch, *map, heads, dim) to (batch, *map, heads, window, dim); zeros beyond the map's end."""
    axes = len(windows)
    for number, window in enumerate(windows):
        axis = 1 + 2 * number
        size = x.shape[axis]
        key = window.key.flatten()
        beyond = (key >= size).view(-1, *[1] * (x.dim() - axis - 1))
        x = x.index_select(axis, key.clamp(max=size - 1)).masked_fill(beyond, 0)
        x = x.unflatten(axis, window.key.shape)
    grid, offsets = [1 + 2 * n for n in range(axes)], [2 + 2 * n for n in range(axes)]
    x = x.permute(0, *grid, 2 * axes + 1, *offsets, 2 * axes + 2)
    return x.flatten(axes + 2, 2 * axes + 1)
