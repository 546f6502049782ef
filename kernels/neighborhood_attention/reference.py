"""Neighborhood attention in tiled PyTorch: dense products of a tile of queries with the slab of keys it sees.

Queries see only keys of their own residue class, so a dilated map is taken apart into one map per class; every class is
padded to the length of the longest. On such a map, a tile of queries (8 x 8 or so) sees a slab, the union of its
windows, which is a slice. Scores of the slab outside a query's own window are masked. Slices and matmuls only: no
(queries, window) copies of keys, and memory is bounded by one tile's scores over as many maps as fit in `_SCORES`.

As the products are dense, a NaN or an infinity in a value reaches every query of the tiles whose slab holds it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmix.kernels.dispatch import compute_dtype
from visionmix.kernels.neighborhood_attention.schema import Arguments, Gradients, mixed_tensors
from visionmix.kernels.neighborhood_attention.tables import inside_disc
from visionmix.kernels.neighborhood_attention.windows import axis_window, class_lengths

# Scores held at once (4 bytes each), unless one map's tile has more.
_SCORES = 1 << 22
# Queries per tile along each axis, at least and at most, by the number of axes.
_TILE = {1: (64, 256), 2: (8, 16), 3: (4, 6)}


@dataclass(frozen=True)
class Problem:
    """The arguments that are not tensors."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    circular: bool

    @property
    def classes(self) -> tuple[int, ...]:
        """Residue classes along each axis."""
        return tuple(min(n, d) for n, d in zip(self.grid, self.dilation, strict=True))

    @property
    def map(self) -> tuple[int, ...]:
        """Size of one residue class's map, padded."""
        return tuple(-(-n // c) for n, c in zip(self.grid, self.classes, strict=True))

    def windows(self, axis: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Starts and stops of one axis, a pair per residue class, or one if all are alike."""
        windows = []
        for length in class_lengths(self.grid[axis], self.dilation[axis]):
            starts, stops = axis_window(
                length, self.kernel_size[axis], self.stride[axis], self.is_causal[axis], self.circular
            )
            # A padded query sees itself, wherever its window would lie: a softmax over nothing has no gradient.
            padding = range(length, self.map[axis])
            windows.append((starts + tuple(padding), stops + tuple(i + 1 for i in padding)))
        return windows if len(set(windows)) > 1 else windows[:1]


@dataclass(frozen=True)
class _Tile:
    """A tile of queries and its slab of keys; slices of the map's axes."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    visible: Tensor  # (classes or 1, queries, keys)
    bias_index: Tensor  # (queries, keys), into the flattened bias table


def _spread(x: Tensor, axis: int, axes: int) -> Tensor:
    """Give (classes, queries, keys) of one axis its places among (classes..., queries..., keys...) of all."""
    shape = [1] * (3 * axes)
    for group, size in enumerate(x.shape):
        shape[group * axes + axis] = size
    return x.reshape(shape)


def _slab(problem: Problem, axis: int, span: slice) -> tuple[slice, tuple]:
    """Return the keys that a span of queries sees along one axis, and its pattern: starts and stops relative to it."""
    windows = [(starts[span], stops[span]) for starts, stops in problem.windows(axis)]
    slab = slice(min(min(starts) for starts, _ in windows), max(max(stops) for _, stops in windows))
    pattern = tuple(tuple(tuple(x - span.start for x in edges) for edges in window) for window in windows)
    return slab, pattern


def _masks(problem: Problem, patterns: list[tuple], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `visible` and `bias_index` of the tiles with these patterns along their axes."""
    axes = len(patterns)
    index, visible, offsets = torch.zeros((), dtype=torch.long), torch.tensor(True), []
    for axis, pattern in enumerate(patterns):
        k = problem.kernel_size[axis]
        first, last = min(min(starts) for starts, _ in pattern), max(max(stops) for _, stops in pattern)
        starts = torch.tensor([starts for starts, _ in pattern]).unsqueeze(-1)
        stops = torch.tensor([stops for _, stops in pattern]).unsqueeze(-1)
        key = torch.arange(first, last)
        visible = visible & _spread((key >= starts) & (key < stops), axis, axes)
        offset = _spread((key - torch.arange(starts.shape[1]).unsqueeze(-1)).unsqueeze(0), axis, axes)
        index = index * (2 * k - 1) + (offset + k - 1).clamp(0, 2 * k - 2)
        offsets.append(offset)
    if problem.circular:
        visible = visible & inside_disc(offsets, problem.kernel_size)
    visible = visible.flatten(2 * axes).flatten(axes, 2 * axes - 1)
    # Where only some axes have classes of two lengths, the others are expanded, so that one index counts all classes.
    if math.prod(visible.shape[:axes]) > 1:
        visible = visible.expand(*problem.classes, -1, -1)
    return visible.flatten(0, axes - 1).to(device), index.flatten(2 * axes).flatten(0, 2 * axes - 1).to(device)


def _spans(length: int, size: int) -> list[slice]:
    """Cut an axis into tiles of about equal size."""
    count = -(-length // size)
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _tiles(problem: Problem) -> list[tuple[slice, ...]]:
    least, most = _TILE[len(problem.grid)]
    spans = [
        _spans(length, min(max(k, least), most)) for length, k in zip(problem.map, problem.kernel_size, strict=True)
    ]
    return list(itertools.product(*spans))


def split(x: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    """(batch, *grid, heads, dim) to (batch x classes, heads, *map, dim)."""
    axes = len(problem.grid)
    padding = [c * m - n for n, c, m in zip(problem.grid, problem.classes, problem.map, strict=True)]
    x = x.to(dtype)
    if any(padding):
        x = F.pad(x, [0, 0, 0, 0] + [amount for p in reversed(padding) for amount in (0, p)])
    for axis in range(axes):
        x = x.unflatten(1 + 2 * axis, (problem.map[axis], problem.classes[axis]))
    order = [0, *range(2, 2 * axes + 1, 2), 2 * axes + 1, *range(1, 2 * axes + 1, 2), 2 * axes + 2]
    return x.permute(order).flatten(0, axes)


def join(x: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    """Undo `split`; contiguous."""
    axes = len(problem.grid)
    x = x.unflatten(0, (-1, *problem.classes))
    order = [0, *(axis for i in range(axes) for axis in (axes + 2 + i, 1 + i)), axes + 1, 2 * axes + 2]
    x = x.permute(order)
    for axis in range(axes):
        x = x.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, problem.grid[axis])
    return x.to(dtype).contiguous()


def _cut(x: Tensor, maps: slice, spans: tuple[slice, ...]) -> Tensor:
    """Return the tokens of some maps' tile or slab, (maps, heads, tokens, dim)."""
    return x[(maps, slice(None), *spans)].flatten(2, -2)


def _assemble(tiles: list[Tensor], problem: Problem) -> Tensor:
    """Put tiles (maps, heads, *tile, dim) together to (maps, heads, *map, dim)."""
    cuts = _tiles(problem)
    for axis in reversed(range(len(problem.grid))):
        count = len({cut[axis].start for cut in cuts})
        tiles = [torch.cat(tiles[i : i + count], dim=2 + axis) for i in range(0, len(tiles), count)]
    return tiles[0]


class _Attention:
    """Tensors of one call, taken apart into maps, and the probabilities of a tile."""

    def __init__(self, a: Arguments):
        problem = self.problem = _problem(a)
        self.scale = a.scale
        self.dtype = compute_dtype(*mixed_tensors(a))
        self.query, self.key, self.value = (split(x, problem, self.dtype) for x in (a.query, a.key, a.value))
        self.extra_key, self.extra_value = (
            None if x is None else x.to(self.dtype).transpose(1, 2) for x in (a.additional_keys, a.additional_values)
        )
        self.extra = 0 if a.additional_keys is None else a.additional_keys.shape[1]
        bias = a.relative_position_bias
        self.bias = None if bias is None else bias.to(self.dtype).flatten(1)
        self.heads, self.groups = a.query.shape[-2], a.key.shape[-2]

    def tiles(self) -> Iterator[tuple[slice, list[_Tile]]]:
        """Yield the maps taken at once, and the tiles to take of them."""
        # Most tiles lie inside the map, where all have the same masks.
        masks: dict[tuple, tuple[Tensor, Tensor]] = {}
        tiles = []
        for queries in _tiles(self.problem):
            slabs, patterns = zip(*(_slab(self.problem, *item) for item in enumerate(queries)), strict=True)
            if patterns not in masks:
                masks[patterns] = _masks(self.problem, patterns, self.query.device)
            tiles.append(_Tile(queries, slabs, *masks[patterns]))
        most = max(tile.bias_index.numel() + tile.bias_index.shape[0] * self.extra for tile in tiles)
        step = max(1, _SCORES // (most * self.heads))
        maps = self.query.shape[0]
        for first in range(0, max(maps, 1), step):
            yield slice(first, min(first + step, maps)), tiles

    def fold(self, x: Tensor) -> Tensor:
        """Put the query heads that share a key head one after another: (maps, groups, heads / groups x tokens, dim)."""
        return x.unflatten(1, (self.groups, -1)).flatten(2, 3)

    def batch_index(self, maps: slice) -> Tensor:
        """Return the image that each map belongs to."""
        return torch.arange(maps.start, maps.stop, device=self.query.device) // math.prod(self.problem.classes)

    def with_extra(self, x: Tensor, extra: Tensor | None, maps: slice) -> Tensor:
        """Append the additional tokens to a slab."""
        return x if extra is None else torch.cat((x, extra.index_select(0, self.batch_index(maps))), dim=2)

    def tile(self, maps: slice, tile: _Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (scaled), keys, values and scores of a tile, the query heads folded."""
        query = self.fold(_cut(self.query, maps, tile.queries)) * self.scale
        key = self.with_extra(_cut(self.key, maps, tile.keys), self.extra_key, maps)
        value = self.with_extra(_cut(self.value, maps, tile.keys), self.extra_value, maps)
        scores = (query @ key.transpose(-1, -2)).unflatten(2, (self.heads // self.groups, -1))
        classes = tile.visible.shape[0]
        near = scores[..., : tile.bias_index.shape[1]]
        if self.bias is not None:
            bias = self.bias.index_select(1, tile.bias_index.flatten()).unflatten(1, tile.bias_index.shape)
            near = near + bias.unflatten(0, (self.groups, -1))
        visible = tile.visible
        if classes > 1:
            visible = visible[torch.arange(maps.start, maps.stop, device=visible.device) % classes]
        near = near.masked_fill(~visible.reshape(-1 if classes > 1 else 1, 1, 1, *visible.shape[1:]), -math.inf)
        if self.extra:
            near = torch.cat((near, scores[..., tile.bias_index.shape[1] :]), dim=-1)
        return query, key, value, near.flatten(2, 3)


def _problem(a: Arguments) -> Problem:
    window = (tuple(x) for x in (a.query.shape[1:-2], a.kernel_size, a.stride, a.dilation))
    return Problem(*window, tuple(map(bool, a.is_causal)), a.circular)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp of the scores); shapes as `na2d`."""
    attention = _Attention(a)
    problem, value = attention.problem, a.value
    outs, sums = [], []
    for maps, tiles in attention.tiles():
        tile_outs, tile_sums = [], []
        for tile in tiles:
            _, _, values, scores = attention.tile(maps, tile)
            shape = (attention.heads, *(span.stop - span.start for span in tile.queries))
            total = scores.logsumexp(-1, keepdim=True)
            out = (scores - total).exp() @ values
            count = maps.stop - maps.start
            tile_outs.append(out.reshape(count, *shape, value.shape[-1]))
            tile_sums.append(total.reshape(count, *shape, 1))
        outs.append(_assemble(tile_outs, problem))
        sums.append(_assemble(tile_sums, problem))
    out = join(torch.cat(outs), problem, value.dtype)
    return out, join(torch.cat(sums), problem, attention.dtype).squeeze(-1)


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value and the three options (empty where there is none), in their dtypes.

    The probabilities are computed again, so `out` and `lse` are not read.
    """
    attention = _Attention(a)
    problem, query, key, value = attention.problem, a.query, a.key, a.value
    options = (a.additional_keys, a.additional_values, a.relative_position_bias)
    grad_out = split(gradients.grad_out, problem, attention.dtype)
    grad_lse = split(gradients.grad_lse.unsqueeze(-1), problem, attention.dtype)
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (attention.query, attention.key, attention.value)
    ]
    grad_query, grad_key, grad_value = grads
    grad_extra_key, grad_extra_value, grad_bias = (
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (attention.extra_key, attention.extra_value, attention.bias)
    )
    for maps, tiles in attention.tiles():
        for tile in tiles:
            queries, keys, values, scores = attention.tile(maps, tile)
            near = tile.bias_index.shape[1]
            spans = (maps, slice(None), *tile.keys)
            slab = [span.stop - span.start for span in tile.keys]
            weights = scores.softmax(-1)
            grad = attention.fold(_cut(grad_out, maps, tile.queries))
            from_value = weights.transpose(-1, -2) @ grad
            grad_weights = grad @ values.transpose(-1, -2)
            mean = (weights * grad_weights).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights - mean + attention.fold(_cut(grad_lse, maps, tile.queries)))
            from_key = grad_scores.transpose(-1, -2) @ queries
            target = grad_query[(maps, slice(None), *tile.queries)]
            target.copy_((grad_scores @ keys * attention.scale).reshape(target.shape))
            grad_key[spans] += from_key[:, :, :near].unflatten(2, slab)
            grad_value[spans] += from_value[:, :, :near].unflatten(2, slab)
            if grad_extra_key is not None:
                batch = attention.batch_index(maps)
                grad_extra_key.index_add_(0, batch, from_key[:, :, near:])
                grad_extra_value.index_add_(0, batch, from_value[:, :, near:])
            if grad_bias is not None:
                total = grad_scores[..., :near].sum(0).reshape(attention.heads, -1)
                grad_bias.index_add_(1, tile.bias_index.flatten(), total)
    joined = [join(grad, problem, x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)]
    extras = (
        query.new_empty(0) if grad is None else grad.transpose(1, 2).to(x.dtype).contiguous()
        for grad, x in zip((grad_extra_key, grad_extra_value), options, strict=False)
    )
    bias = query.new_empty(0) if grad_bias is None else grad_bias.view_as(options[2]).to(options[2].dtype)
    return *joined, *extras, bias
