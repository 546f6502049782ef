"""Neighborhood attention in an exported graph: one product of all tiles of queries with the slabs of keys they see.

Along each axis, the queries of a residue class of the dilation are cut into tiles. All tiles have the same length, and
so have their slabs, the keys around a tile: tables of places gather both, and nothing loops over a size, which may be a
symbol.

Every tile has its slab at the same distance, so that one table of position biases serves all; which keys a query sees
is told from its own place. Where an axis of fixed size has too few tokens for tiles to save work, it is one tile, and
all its keys are one slab.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from visionmix.kernels.dispatch import compute_dtype
from visionmix.kernels.exported import numbers
from visionmix.kernels.neighborhood_attention.schema import Arguments, mixed_tensors
from visionmix.kernels.neighborhood_attention.tables import at_most, inside_disc, window_bounds
from visionmix.private_api import outside_of_tracing

# Queries per tile along each axis, unless half a window is longer, by the number of axes. The maps of models for 224
# pixels are cut by 7 without a rest.
_TILE = {1: 32, 2: 7, 3: 4}


class _Axis:
    """How one axis is cut. Blocks are the tiles of all residue classes, tile by tile.

    Args:
        size: tokens, which may be a symbol.
        dilation: which may be a symbol.
        tile: queries per tile, unless half a window is longer.

    Attributes:
        blocks: their number.
        tile: queries a block.
        slab: keys a block.
        before: the keys of them before its first query.
        extended: whether keys are taken from the axis with a token of padding behind it.
        queries: the tokens of all blocks' queries, int64 (blocks x tile), or None where they are all tokens in order.
        keys: the tokens of their keys, int64 (blocks x slab), or None likewise.
        visible: whether a query sees a key, (blocks, tile, slab), or None where all see all.
        places: each token's place among the queries, int64 (tokens), or None where they are in order.
    """

    def __init__(self, size, kernel_size: int, stride: int, dilation, causal: bool, circular: bool, tile: int, device):
        extended = size if circular else torch.sym_max(size, kernel_size * dilation)
        before, after = _reach(kernel_size, stride, causal, circular)
        # Of half a window at least, so that near an end the slab holds windows that are shifted inside.
        tile = max(tile, kernel_size // 2 + 1)
        count = (size + dilation * tile - 1) // (dilation * tile)
        fixed, dilated = _is_fixed(size, dilation), not _is_fixed(dilation) or dilation != 1
        single = False
        if fixed:
            queries, keys = -(-size // dilation), -(-extended // dilation)
            single = queries * keys <= count * tile * (before + tile + after)
            if single:
                count, tile, before, after = 1, queries, 0, keys - queries
        else:
            # Of a length that may be 1, PyTorch's exporter asks whether it is, and fixes the answer for all sizes.
            count = torch.sym_max(count, 2)
        self.blocks, self.tile, self.slab, self.before = count * dilation, tile, before + tile + after, before
        self.extended = not circular and not (fixed and extended == size)

        number, length = torch.arange(self.blocks, device=device).unsqueeze(1), extended
        if dilated:
            block, number = number, number // dilation
            residue = block - number * dilation  # no remainder: ONNX takes none by a symbol
            # A class without a token, of a circular window, passes for one with a token.
            length = ((extended - residue + dilation - 1) // dilation).clamp(min=1)
        # A class's last tile begins early enough to be full.
        first = at_most(number * tile, length - tile).clamp(min=0)
        query = at_most(first + torch.arange(tile, device=device), length - 1)
        key = first + torch.arange(-before, self.slab - before, device=device)
        start, stop = window_bounds(query, length, kernel_size, stride, causal, circular)
        seen = key.unsqueeze(1)
        self.visible = (seen >= start.clamp(min=0).unsqueeze(2)) & (seen < stop.unsqueeze(2))
        token = torch.arange(size, device=device)
        if dilated:
            query, key, position = query * dilation + residue, key * dilation + residue, token // dilation
            block = position // tile * dilation + token - position * dilation
            self.places = block * tile + position - first.flatten().index_select(0, block)
        else:
            begin = token // tile * tile
            self.places = begin + token - at_most(begin, length - tile).clamp(min=0)
        self.queries = query.clamp(max=size - 1).flatten()
        self.keys = key.clamp(0, size if self.extended else size - 1).flatten()
        if fixed and not dilated:
            if size == count * tile:
                self.queries = self.places = None
            if single and not self.extended:
                self.keys = None
        if single and kernel_size * dilation == extended and not causal and not circular:
            self.visible = None


def _is_fixed(*sizes) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _reach(kernel_size: int, stride: int, causal: bool, circular: bool) -> tuple[int, int]:
    """Return how many keys a query may see before and after it, away from the ends of an axis."""
    half = kernel_size // 2
    if circular:
        return half, 0 if causal else half
    if causal:
        return kernel_size - 1, 0
    # Of the queries that share a window, the first sees most keys after it, and the last before it.
    leader = stride // 2
    return half + stride - 1 - leader, kernel_size - 1 - half + leader


@lru_cache(maxsize=64)
def _axis_of_fixed_size(*options) -> _Axis:
    # As constants of the graph, in place of the operators that make them, whatever is traced at the first call.
    with outside_of_tracing(), torch.inference_mode(False):
        return _Axis(*options)


def _axes(a: Arguments) -> list[_Axis]:
    grid, dilations = numbers(*a.query.shape[1:-2]), numbers(*a.dilation)
    axes = []
    for size, k, s, d, causal in zip(grid, a.kernel_size, a.stride, dilations, a.is_causal, strict=True):
        make = _axis_of_fixed_size if _is_fixed(size, d) else _Axis
        axes.append(make(size, k, s, d, bool(causal), a.circular, _TILE[len(grid)], a.query.device))
    return axes


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp of the scores); shapes as `na2d`. Sizes of the map and dilations may be symbols."""
    dtype, axes, groups = compute_dtype(*mixed_tensors(a)), _axes(a), a.key.shape[-2]
    # (batch, key heads, query heads that share one, *blocks, tokens, dim), with 1 such head for keys.
    query = _cut(a.query.to(dtype) * a.scale, [(axis.queries, axis.blocks, axis.tile) for axis in axes])
    query = query.unflatten(1, (groups, -1))
    slabs = [(axis.keys, axis.blocks, axis.slab) for axis in axes]
    key = _cut(_extend(a.key.to(dtype), axes, a.key_padding), slabs).unsqueeze(2)
    value = _cut(_extend(a.value.to(dtype), axes, a.value_padding), slabs).unsqueeze(2)

    scores = query @ key.transpose(-1, -2)
    bias, visible = _bias(a, axes, dtype), _visible(axes)
    if bias is not None:
        # (key heads or 1, query heads that share one or 1, 1 for each axis, tile, slab)
        bias = bias.unflatten(0, (min(groups, bias.shape[0]), -1))
        scores = scores + bias[(slice(None), slice(None), *[None] * len(axes))]
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if a.additional_keys is None:
        out = scores.softmax(-1) @ value
    else:
        more_keys, more_values = (
            x.to(dtype).transpose(1, 2)[(slice(None), slice(None), None, *[None] * len(axes))]
            for x in (a.additional_keys, a.additional_values)
        )
        near = scores.shape[-1]
        scores = torch.cat([scores, query @ more_keys.transpose(-1, -2)], -1)
        weights = scores.softmax(-1)
        out = weights[..., :near] @ value + weights[..., near:] @ more_values
    total = scores.logsumexp(-1, keepdim=True)
    return _join(out, axes).to(a.value.dtype), _join(total, axes).squeeze(-1)


def _extend(x: Tensor, axes: list[_Axis], padding: Tensor | None) -> Tensor:
    """Return x (batch, *map, heads, dim) with a token of padding, or zeros, behind each axis that may need it."""
    fill = x.new_zeros(()) if padding is None else padding.to(x.dtype)
    for number, axis in enumerate(axes, 1):
        if axis.extended:
            x = torch.cat([x, fill.expand(*x.shape[:number], 1, *x.shape[number + 1 :])], number)
    return x


def _cut(x: Tensor, tables: Sequence[tuple]) -> Tensor:
    """(batch, *map, heads, dim) to (batch, heads, *blocks, tokens, dim), by each axis's table, blocks and tokens."""
    axes = len(tables)
    for number, (table, blocks, tokens) in enumerate(tables):
        axis = 1 + 2 * number
        if table is not None:
            x = x.index_select(axis, table)
        x = x.unflatten(axis, (blocks, tokens))
    order = [0, 2 * axes + 1, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 2]
    return x.permute(order).flatten(2 + axes, 1 + 2 * axes)


def _join(x: Tensor, axes: list[_Axis]) -> Tensor:
    """Undo `_cut` of queries: (batch, key heads, heads that share one, *blocks, tokens, dim) to a map."""
    count = len(axes)
    x = x.flatten(1, 2).unflatten(2 + count, [axis.tile for axis in axes])
    x = x.permute(0, *(place for n in range(count) for place in (2 + n, 2 + count + n)), 1, 2 + 2 * count)
    for number, axis in enumerate(axes, 1):
        x = x.flatten(number, number + 1)
        if axis.places is not None:
            x = x.index_select(number, axis.places)
    return x.contiguous()


def _visible(axes: list[_Axis]) -> Tensor | None:
    """Return which keys of its slab each query sees, bool (*blocks, tile, slab), or None where all see all."""
    visible, count = None, len(axes)
    for number, axis in enumerate(axes):
        if axis.visible is not None:
            # Its blocks, queries and keys are one axis each of (*blocks, *tile, *slab).
            places = (slice(None) if n % count == number else None for n in range(3 * count))
            each = axis.visible[tuple(places)]
            visible = each if visible is None else visible & each
    if visible is None:
        return None
    shape = [axis.tile for axis in axes] + [axis.slab for axis in axes]
    visible = visible.expand(*visible.shape[:count], *shape)
    return visible.flatten(2 * count).flatten(count, 2 * count - 1)


def _bias(a: Arguments, axes: list[_Axis], dtype: torch.dtype) -> Tensor | None:
    """Return the position biases of a tile and its slab, (heads or 1, tile, slab), or None where there are none.

    Those of keys outside a circular window hide them. They are finite: for a query that fills a tile up, they may hide
    its only key, and a softmax over nothing has no gradient.
    """
    bias, count = a.relative_position_bias, len(axes)
    if a.circular:
        outside = _outside_disc(tuple(a.kernel_size), a.query.device)
        bias = torch.zeros(1, *outside.shape, device=outside.device) if bias is None else bias
        bias = bias.to(dtype).masked_fill(outside, torch.finfo(dtype).min / 2)
    if bias is None:
        return None
    bias = bias.to(dtype)
    for number, (axis, k) in enumerate(zip(axes, a.kernel_size, strict=True)):
        table = _bias_places(axis.tile, axis.slab, axis.before, k, bias.device)
        bias = bias.index_select(1 + 2 * number, table).unflatten(1 + 2 * number, (axis.tile, axis.slab))
    bias = bias.permute(0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2))
    return bias.flatten(1 + count).flatten(1, count)


@lru_cache(maxsize=64)
def _outside_disc(kernel_size: tuple[int, ...], device: torch.device) -> Tensor:
    """Return whether steps that a table of biases holds lead out of a circular window, bool (2 k - 1, ...)."""
    with outside_of_tracing(), torch.inference_mode(False):
        steps = torch.meshgrid([torch.arange(1 - k, k) for k in kernel_size], indexing="ij")
        return ~inside_disc(steps, kernel_size).to(device)


@lru_cache(maxsize=64)
def _bias_places(tile: int, slab: int, before: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return the place in a table of biases of the step from each query of a tile to each key, int64 (tile x slab)."""
    with outside_of_tracing(), torch.inference_mode(False):
        steps = torch.arange(slab) - before - torch.arange(tile).unsqueeze(1)
        return (steps + kernel_size - 1).clamp(0, 2 * kernel_size - 2).flatten().to(device)
