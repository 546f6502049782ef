"""Neighborhood attention on maps smaller than the window spans: the map is extended before and cropped after.

Both happen inside the op, so that compiled graphs hold only tensors of the map's own size. The extended size is a
maximum of two, and where strides depend on one, Inductor guards on them and compiles again from size to size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from visionmix.kernels.dispatch import Implementation, compute_dtype
from visionmix.kernels.neighborhood_attention.schema import Arguments, Gradients
from visionmix.kernels.neighborhood_attention.tables import Window
from visionmix.kernels.neighborhood_attention.windows import count_pairs


def extended_grid(
    grid: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], circular: bool
) -> tuple[int, ...]:
    """Return the size of the map that the implementations see, at least ``kernel_size * dilation`` along each axis.

    A circular window is cut at the border, so it fits every map.
    """
    if circular:
        return tuple(grid)
    return tuple(max(n, k * d) for n, k, d in zip(grid, kernel_size, dilation, strict=True))


def pairs(queries: Sequence[int], window: Window, additional_keys: Sequence[int] | None) -> int:
    """Return the (query, key) pairs of all images and heads, those of padded queries too: they are computed.

    Queries and additional keys are given by their shapes, (batch, *map, heads, ...) and (batch, extra, ...).
    """
    batch, *grid, heads, _ = queries
    kernel_size, stride, dilation, is_causal = map(tuple, window[:4])
    grid = extended_grid(grid, kernel_size, dilation, window.circular)
    extra = 0 if additional_keys is None else additional_keys[1] * math.prod(grid)
    return batch * heads * (count_pairs(grid, kernel_size, stride, dilation, is_causal, window.circular) + extra)


def extend(x: Tensor, grid: tuple[int, ...], fill: Tensor | None) -> Tensor:
    """Return x (batch, *map, ...) with `fill` (...), or zeros, after the map's end along each axis, up to `grid`."""
    fill = x.new_zeros(()) if fill is None else fill.to(x.dtype)
    for axis, size in enumerate(grid, 1):
        missing = size - x.shape[axis]
        if missing:
            x = torch.cat([x, fill.expand(*x.shape[:axis], missing, *x.shape[axis + 1 :])], axis)
    return x


def _crop(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return x (batch, *extended map, ...) up to `grid`, contiguous."""
    return x[(slice(None), *map(slice, grid))].contiguous()


def _sum_outside(x: Tensor, grid: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the sum of x (batch, *extended map, heads, dim) over batch and tokens outside `grid`, (heads, dim)."""
    total = x.new_zeros(x.shape[-2:], dtype=compute_dtype(x))
    for axis, size in enumerate(grid, 1):
        outside = x.narrow(axis, size, x.shape[axis] - size)
        total += outside.flatten(0, -3).sum(0, dtype=total.dtype)
        x = x.narrow(axis, 0, size)
    return total.to(like.dtype)


def _grids(a: Arguments) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the map's size and the extended one."""
    grid = tuple(a.query.shape[1:-2])
    return grid, extended_grid(grid, a.kernel_size, a.dilation, a.circular)


def _extended(a: Arguments, grid: tuple[int, ...]) -> Arguments:
    fills = {"query": None, "key": a.key_padding, "value": a.value_padding}
    return a._replace(**{name: extend(getattr(a, name), grid, fill) for name, fill in fills.items()})


def forward(inner: Callable, a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of the map, `inner` being an implementation's forward on a map that is large enough.

    Tokens added at the map's end have the key `key_padding` (key heads, dim) and the value `value_padding` (key heads,
    value dim), or zeros.
    """
    grid, extended = _grids(a)
    if extended == grid:
        return inner(a)
    out, lse = inner(_extended(a, extended))
    return _crop(out, grid), _crop(lse, grid)


def backward(inner: Callable, a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, the three options and the paddings, empty where there is none.

    `inner` is an implementation's backward; it returns the first six on a map that is large enough.
    """
    grid, extended = _grids(a)
    paddings = (a.key_padding, a.value_padding)
    if extended == grid:
        grads = inner(a, gradients)
        return *grads, *(a.query.new_zeros(0) if x is None else x.new_zeros(x.shape) for x in paddings)
    # An added query has no gradient, and with a log-sum-exp of infinity no weight: exp(score - inf) = 0.
    fills = Gradients(None, None, None, gradients.lse.new_full((), torch.inf))
    gradients = Gradients._make(extend(x, extended, fill) for x, fill in zip(gradients, fills, strict=True))
    grads = inner(_extended(a, extended), gradients)
    outside = (
        a.query.new_zeros(0) if x is None else _sum_outside(grad, grid, x)
        for x, grad in zip(paddings, grads[1:3], strict=True)
    )
    return *(_crop(grad, grid) for grad in grads[:3]), *grads[3:], *outside


def padded(load: Callable[[], Implementation]) -> Callable[[], Implementation]:
    """Return a loader of `load`'s implementation with the padding around it."""

    def load_padded() -> Implementation:
        inner = load()
        return Implementation(partial(forward, inner.forward), partial(backward, inner.backward))

    return load_padded
