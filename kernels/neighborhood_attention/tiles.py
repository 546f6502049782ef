"""The products of queries with the keys of their windows, and sums of values by window, as products of matrices.

A dilated map is taken apart into one map per residue class. On each, a tile of queries (`kernel_size + 1` a side or so)
meets a slab of keys, the union of its windows. All tiles and slabs are of one size, so that they are two views of the
padded map and one batched product serves them all; of its entries, those of a query's own window are taken.

Tiles and slabs are regular views, and no two keys of a window are one, so that every gradient adds up in a fixed order.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels.neighborhood_attention.padding import extend, extended_grid
from visionmix.kernels.neighborhood_attention.reference import Problem, join, split
from visionmix.kernels.neighborhood_attention.tables import AxisTable, Tables, Window
from visionmix.private_api import outside_of_tracing

_TILE = (4, 16)  # queries along each axis, at least and at most


class _Axis(NamedTuple):
    """How one axis of a residue class's map is cut.

    Attributes:
        count: tiles.
        tile: queries a tile.
        before: keys of a slab before its tile's first query.
        slab: keys a slab.
        index: each key's place in its slab, int64 (classes or 1, tiles, queries, kernel size).
    """

    count: int
    tile: int
    before: int
    slab: int
    index: Tensor


@lru_cache(maxsize=64)
def _axis(size: int, kernel_size: int, stride: int, dilation: int, causal: bool, circular: bool) -> _Axis:
    # Real tensors that any pass may keep, whatever is traced at the first call.
    with outside_of_tracing(), torch.inference_mode(False):
        classes = min(size, dilation)
        length = -(-size // classes)
        least, most = _TILE
        count = -(-length // min(max(kernel_size + 1, least), most))
        tile = -(-length // count)
        steps = AxisTable(size, kernel_size, stride, dilation, causal, circular, "cpu").steps
        # Places of the keys, counted from the tile's first query.
        place = steps + (torch.arange(size) // dilation % tile).unsqueeze(1)
        before = max(0, -int(place.min()))
        slab = before + max(int(place.max()) + 1, tile)
        # Queries that pad the map see any keys, no two of them the same.
        index = _padded(place + before, classes * length).view(length, classes, kernel_size).transpose(0, 1)
        index = index[: 1 if size == classes * length else classes]
        index = _padded(index, count * tile).unflatten(1, (count, tile))
        return _Axis(count, tile, before, slab, index)


def _padded(index: Tensor, length: int) -> Tensor:
    """Return the index (..., queries, kernel size) with rows that count from 0 behind it, up to `length`."""
    missing = length - index.shape[-2]
    return torch.cat([index, torch.arange(index.shape[-1]).expand(*index.shape[:-2], missing, -1)], -2)


class _Tiling:
    """A map's tiles and slabs: takes maps apart and puts tiles together."""

    def __init__(self, grid: tuple[int, ...], window: Window, dtype: torch.dtype, device: torch.device):
        options = [tuple(x) for x in window[:3]]
        causal = tuple(map(bool, window.is_causal))
        self.grid = grid
        extended = extended_grid(grid, window.kernel_size, window.dilation, window.circular)
        self.problem = Problem(extended, *options, causal, window.circular)
        self.dtype = dtype
        self.axes = [_axis(*each, window.circular) for each in zip(extended, *options, causal, strict=True)]
        self.index = self._index(device)

    def _index(self, device: torch.device) -> Tensor:
        """Return each key's place in the flattened slab, int64 (classes or 1, tiles, queries, window)."""
        count, index = len(self.axes), torch.zeros((), dtype=torch.int64, device=device)
        for number, axis in enumerate(self.axes):
            shape = [1] * (4 * count)
            for group, size in enumerate(axis.index.shape):
                shape[group * count + number] = size
            index = index * axis.slab + axis.index.to(device).view(shape)
        if math.prod(index.shape[:count]) > 1:
            index = index.expand(*self.problem.classes, *index.shape[count:])
        for group in range(4):
            index = index.flatten(group, group + count - 1)
        return index

    def _maps(self, x: Tensor) -> Tensor:
        """(batch, *grid, heads, dim) to (batch x classes, heads, *map, dim)."""
        return split(extend(x, self.problem.grid, None), self.problem, self.dtype)

    def tiles(self, x: Tensor) -> Tensor:
        """(batch, *grid, heads, dim) to (batch x classes, heads, tiles, queries, dim)."""
        count = len(self.axes)
        x = self._maps(x)
        sizes = zip(self.axes, x.shape[2:-1], strict=True)
        x = F.pad(x, [0, 0, *(end for axis, size in [*sizes][::-1] for end in (0, axis.count * axis.tile - size))])
        for number, axis in enumerate(self.axes):
            x = x.unflatten(2 + 2 * number, (axis.count, axis.tile))
        order = [0, 1, *range(2, 2 + 2 * count, 2), *range(3, 3 + 2 * count, 2), 2 + 2 * count]
        return x.permute(order).flatten(2, 1 + count).flatten(3, 2 + count)

    def slabs(self, x: Tensor) -> Tensor:
        """(batch, *grid, heads, dim) to (batch x classes, heads, tiles, dim, keys)."""
        count = len(self.axes)
        x = self._maps(x)
        ends = [0, 0]
        for axis, size in [*zip(self.axes, x.shape[2:-1], strict=True)][::-1]:
            ends += [axis.before, (axis.count - 1) * axis.tile + axis.slab - axis.before - size]
        x = F.pad(x, ends)
        for number, axis in enumerate(self.axes):
            x = x.unfold(2 + number, axis.slab, axis.tile)
        return x.flatten(2, 1 + count).flatten(4)

    def untiled(self, x: Tensor) -> Tensor:
        """Undo `tiles`."""
        count = len(self.axes)
        x = x.unflatten(3, [axis.tile for axis in self.axes]).unflatten(2, [axis.count for axis in self.axes])
        order = [0, 1, *(place for n in range(count) for place in (2 + n, 2 + count + n)), 2 + 2 * count]
        x = x.permute(order)
        for number, size in enumerate(self.problem.map):
            x = x.flatten(2 + number, 3 + number).narrow(2 + number, 0, size)
        return join(x, self.problem, self.dtype)[(slice(None), *map(slice, self.grid))]

    def places(self, like: Tensor) -> Tensor:
        """Return `index` expanded to (images, classes or 1, heads, tiles, queries, window), for tensors like `like`
        (batch x classes, heads, ...)."""
        classes = self.index.shape[0]
        return self.index.unsqueeze(1).expand(like.shape[0] // classes, classes, like.shape[1], -1, -1, -1)


def products(query: Tensor, key: Tensor, tables: Tables) -> Tensor:
    """Return what `gathered.products` does."""
    tiling = _Tiling(tuple(query.shape[1:-2]), tables.window, query.dtype, query.device)
    queries = tiling.tiles(query).unflatten(1, (key.shape[-2], -1))
    scores = (queries @ tiling.slabs(key).unsqueeze(2)).flatten(1, 2)
    places = tiling.places(scores)
    return tiling.untiled(scores.unflatten(0, places.shape[:2]).gather(-1, places).flatten(0, 1))


def sums(weights: Tensor, value: Tensor, tables: Tables) -> Tensor:
    """Return what `gathered.sums` does."""
    tiling = _Tiling(tuple(weights.shape[1:-2]), tables.window, weights.dtype, weights.device)
    weights = tiling.tiles(weights)
    places = tiling.places(weights)
    spread = weights.new_zeros(*places.shape[:-1], math.prod(axis.slab for axis in tiling.axes))
    spread = spread.scatter(-1, places, weights.unflatten(0, places.shape[:2])).flatten(0, 1)
    values = tiling.slabs(value).transpose(-1, -2).unsqueeze(2)
    return tiling.untiled((spread.unflatten(1, (value.shape[-2], -1)) @ values).flatten(1, 2))
