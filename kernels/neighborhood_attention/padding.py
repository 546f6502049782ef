"""Neighborhood attention on maps smaller than the window spans: the map is extended before and cropped after.

Both happen inside the op, so that compiled graphs hold tensors of the map's own size alone. The extended size is a
maximum of two, and where strides depend on one, Inductor guards on them and compiles anew from size to size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionmix.kernels.dispatch import Implementation, compute_dtype


def extended_grid(
    grid: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], circular: bool
) -> tuple[int, ...]:
    """Return the size of the map that the implementations see, at least ``kernel_size * dilation`` along each axis.

    A circular window is cut at the border, so it fits every map.
    """
    if circular:
        return tuple(grid)
    return tuple(max(n, k * d) for n, k, d in zip(grid, kernel_size, dilation, strict=True))


def _extend(x: Tensor, grid: tuple[int, ...], fill: Tensor | None) -> Tensor:
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


def split_options(args: tuple) -> tuple[tuple, tuple]:
    """Return the options that an implementation takes (kernel_size to circular), and (key_padding, value_padding).

    The dispatcher leaves out trailing arguments that are None.
    """
    return args[:9], (*args[9:11], None, None)[:2]


def _grids(query: Tensor, options: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the map's size and the extended one."""
    kernel_size, _, dilation, *_, circular = options
    grid = tuple(query.shape[1:-2])
    return grid, extended_grid(grid, kernel_size, dilation, circular)


def forward(inner: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of the map, `inner` being an implementation's forward on a map that is large enough.

    Arguments as `neighborhood_attention_op`. Tokens added at the map's end have the key `key_padding` (key heads, dim)
    and the value `value_padding` (key heads, value dim), or zeros.
    """
    options, paddings = split_options(args)
    grid, extended = _grids(query, options)
    if extended == grid:
        return inner(query, key, value, *options)
    tensors = zip((query, key, value), (None, *paddings), strict=True)
    out, lse = inner(*(_extend(x, extended, fill) for x, fill in tensors), *options)
    return _crop(out, grid), _crop(lse, grid)


def backward(
    inner: Callable,
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, the three options and the paddings, empty where there is none.

    `inner` is an implementation's backward; it returns the first six on a map that is large enough.
    """
    options, paddings = split_options(args)
    grid, extended = _grids(query, options)
    tensors = (grad_out, grad_lse, query, key, value, out, lse)
    if extended == grid:
        grads = inner(*tensors, *options)
        return *grads, *(query.new_zeros(0) if x is None else x.new_zeros(x.shape) for x in paddings)
    # An added query has no gradient, and with a log-sum-exp of infinity no weight: exp(score - inf) = 0.
    fills = (None, None, None, *paddings, None, lse.new_full((), torch.inf))
    grads = inner(*(_extend(x, extended, fill) for x, fill in zip(tensors, fills, strict=True)), *options)
    outside = (
        query.new_zeros(0) if x is None else _sum_outside(grad, grid, x)
        for x, grad in zip(paddings, grads[1:3], strict=True)
    )
    return *(_crop(grad, grid) for grad in grads[:3]), *grads[3:], *outside


def padded(load: Callable[[], Implementation]) -> Callable[[], Implementation]:
    """Return a loader of what `load` loads, with the padding around it."""

    def load_padded() -> Implementation:
        inner = load()
        return Implementation(partial(forward, inner.forward), partial(backward, inner.backward))

    return load_padded
