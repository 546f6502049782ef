"""The selective scan over several orders of a map in Triton: every order reads the map in place.

A table of slots says which cell each step of an order reads and to which route its output belongs, so no tensor is
permuted; a low-rank delta is multiplied out tile by tile. A program of one warp takes a tile of an order's channels.
Each order writes a map of its own, and the maps are summed, always in the same order.

Liu et al., 2024, VMamba: Visual State Space Model (arXiv 2401.10166).
"""

import logging
from functools import cache, lru_cache

import numpy as np
import torch
import triton
from torch import Tensor

from visionmix.kernels.dispatch import log_slow_path
from visionmix.kernels.gpu import dot_precision, launch
from visionmix.kernels.selective_scan_2d import reference
from visionmix.kernels.selective_scan_2d.routes import routes
from visionmix.kernels.selective_scan_2d.schema import SCHEMA, Arguments, Gradients
from visionmix.kernels.selective_scan_2d.triton_kernels import backward_kernel, forward_kernel
from visionmix.scans.order_names import count_routes, split_orders

_logger = logging.getLogger("visionmix.kernels")

# Steps and channels of a tile, the fastest of those timed on an H200. The wide one, which reads slots, B and C once for
# twice the channels, is for problems that give a GPU so many programs.
ENOUGH_PROGRAMS = 1024
_WIDE_TILE = (8, 64)
_FORWARD_TILE = (16, 32)
_BACKWARD_TILE = (16, 16)


@lru_cache(maxsize=64)
def _slots(orders: str, height: int, width: int) -> tuple[np.ndarray, list[int]] | None:
    """Return the slot of each step, route x cells + cell or -1, int32 (K, steps), and the number of routes an order.

    Where every order is one route, slots are cells. None if a step that reads a cell does not give its output back to
    that cell, once.
    """
    table = routes(orders, height, width, "all")
    cells = height * width
    slots = np.full(table.index.size, -1)
    taken = table.inverse.reshape(-1)
    named = np.flatnonzero(taken >= 0)
    slots[taken[named]] = named
    slots = slots.reshape(table.index.shape)
    if not np.array_equal(np.where(slots < 0, -1, slots % cells), table.index):
        return None
    per_order = [count_routes(name) for name in split_orders(orders)]
    if max(per_order) == 1:
        slots = table.index
    return slots.astype(np.int32), per_order


@lru_cache(maxsize=64)
def _device_slots(orders: str, height: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor(_slots(orders, height, width)[0], device=device)


@cache
def _log_reference(orders: str) -> None:
    _logger.warning(
        "selective_scan_2d runs its PyTorch reference: orders=%r read cells that they do not write back; "
        "choose orders that do",
        orders,
    )


def _leaves_to_reference(a: Arguments) -> bool:
    """Return whether the kernels cannot read what is asked for; log it once."""
    if a.permute == "input":
        log_slow_path(
            "selective_scan_2d",
            "the Triton kernels read delta, B and C in the order of x, not in raster order",
            'pass permute="all" where the model allows another scan',
        )
        return True
    if _slots(a.orders, a.x.shape[1], a.x.shape[2]) is None:
        _log_reference(a.orders)
        return True
    return False


class _Problem:
    """Sizes, tables and the arguments that both kernels take."""

    def __init__(self, a: Arguments, *, backward: bool):
        x, delta, weight, A, B, C, D, bias = SCHEMA.input_tensors(a)
        orders = a.orders
        self.batch, self.height, self.width, self.channels = x.shape
        self.cells = self.height * self.width
        self.orders, _, self.states = A.shape
        self.rank = 0 if weight is None else weight.shape[2]
        table, self.per_order = _slots(orders, self.height, self.width)
        self.routes, self.steps = sum(self.per_order), table.shape[1]
        self.complete = table.size == (table >= 0).sum() == self.routes * self.cells
        self.tokens, self.block = _BACKWARD_TILE if backward else self.forward_tile()
        self.chunks = triton.cdiv(self.steps, self.tokens)
        self.tiles = triton.cdiv(self.channels, self.block)
        self.grid = (self.batch, self.tiles, self.orders)
        self.like = x
        # One axis of cells: a view, unless a map's rows do not follow each other.
        x, delta, B, C = (y.flatten(1, 2) for y in (x, delta, B, C))
        strides = {}
        for name, y, axes in (
            ("x", x, "btc"),
            ("d", delta, "btkc"),
            ("w", weight, "kcr"),
            ("A", A, "kcn"),
            ("B", B, "btkn"),
            ("C", C, "btkn"),
        ):
            strides |= {f"s{name}_{axis}": 0 if y is None else y.stride(i) for i, axis in enumerate(axes)}
        self.arguments = {
            "p_x": x,
            "p_delta": delta,
            "p_weight": weight,
            "p_A": A,
            "p_B": B,
            "p_C": C,
            "p_D": None if D is None else D.contiguous(),
            "p_bias": None if bias is None else bias.contiguous(),
            "p_slots": _device_slots(orders, self.height, self.width, x.device),
            "steps": self.steps,
            "cells": self.cells,
            "channels": self.channels,
            **strides,
            "JOINED": self.routes != self.orders,
            "INT64": self.needs_int64(x, delta, B, C),
            "RANK": self.rank,
            "N": self.states,
            "BN": triton.next_power_of_2(self.states),
            "BC": self.block,
            "BT": self.tokens,
            "SOFTPLUS": a.delta_softplus,
        }
        self.precision = dot_precision(x, delta, weight)
        # Each order reads the whole map; what has no channels is read once a channel tile.
        self.passes = {"p_x": self.orders, "p_B": self.tiles, "p_C": self.tiles, "p_slots": self.batch * self.tiles}
        if self.rank:
            self.passes["p_delta"] = self.tiles
        self.size = self.batch * self.orders * self.steps * self.channels

    def forward_tile(self) -> tuple[int, int]:
        """Return the steps and channels of forward's tile."""
        programs = self.batch * triton.cdiv(self.channels, _WIDE_TILE[1]) * self.orders
        return _WIDE_TILE if programs >= ENOUGH_PROGRAMS else _FORWARD_TILE

    def needs_int64(self, *maps: Tensor) -> bool:
        """Return whether an offset within an image, of the inputs or of a gradient, can pass int32."""
        largest = self.cells * self.routes * max(self.channels, self.rank, self.states)
        for y in maps:
            steps = zip(y.shape[1:], y.stride()[1:], strict=True)
            largest = max(largest, sum((size - 1) * stride for size, stride in steps))
        return largest >= 1 << 31

    def map_buffer(self) -> tuple[Tensor, dict[str, int]]:
        """Return where the routes' maps go before they are merged, and its strides."""
        shape = (self.routes, self.batch, self.cells, self.channels)
        make = self.like.new_empty if self.complete else self.like.new_zeros
        buffer = make(shape, dtype=torch.float32)
        return buffer, dict(zip(("so_k", "so_b", "so_t", "so_c"), buffer.stride(), strict=True))

    def merged_map(self, buffer: Tensor, dtype: torch.dtype | None = None, factor: float = 1.0) -> Tensor:
        """Sum a buffer of maps; (batch, height, width, channels), in x's dtype if None is given."""
        total = buffer.sum(0) if buffer.shape[0] > 1 else buffer[0]
        return (total if factor == 1.0 else total * factor).view(self.like.shape).to(dtype or self.like.dtype)

    def by_order(self, grad: Tensor, like: Tensor) -> Tensor:
        """Sum (batch, cells, routes, features) over the routes of each order, to the shape and dtype of `like`."""
        if self.routes != self.orders:
            grad = torch.stack([part.sum(2) for part in grad.split(self.per_order, 2)], 2)
        return grad.reshape(like.shape).to(like.dtype)

    def forward(self, out: Tensor | None, states: Tensor | None, strides: dict[str, int]) -> None:
        # Without an output, D is not read.
        unused = {} if out is not None else {"p_D": None}
        launch(
            forward_kernel,
            self.grid,
            **self.arguments | unused,
            **strides,
            p_out=out,
            p_states=states,
            num_warps=1,
            passes=self.passes | ({"p_C": 0} if out is None else {}),
            flops=self.size * (7 * self.states + 3 + 2 * self.rank),
        )


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the merged outputs, and nothing: the backward pass finds the states itself.

    Shapes as `selective_scan_2d`, the order names joined by commas.
    """
    x, merge = a.x, a.merge
    if _leaves_to_reference(a):
        return reference.forward(a)
    problem = _Problem(a, backward=False)
    nothing = x.new_empty(0, dtype=torch.float32)
    if merge == "none":
        make = x.new_empty if problem.complete else x.new_zeros
        out = make((*x.shape[:3], problem.routes, problem.channels), dtype=a.out_dtype)
        strides = {"so_b": out.stride(0), "so_k": out.stride(3), "so_t": out.stride(2), "so_c": 1}
        problem.forward(out, None, strides)
        return out, nothing
    out, strides = problem.map_buffer()
    problem.forward(out, None, strides)
    return problem.merged_map(out, a.out_dtype, 1 / problem.routes if merge == "mean" else 1.0), nothing


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of the eight tensors of the input, in their dtypes, empty for what is None."""
    if _leaves_to_reference(a):
        return reference.backward(a, gradients)
    x, delta, delta_weight, A, B, C, D, delta_bias = SCHEMA.input_tensors(a)
    grad_out, merge = gradients.grad_out, a.merge
    problem = _Problem(a, backward=True)

    def empty(*shape: int, zeros: bool = False) -> Tensor:
        return (x.new_zeros if zeros else x.new_empty)(shape, dtype=torch.float32)

    batch, count, channels, states = problem.batch, problem.orders, problem.channels, problem.states
    entering = empty(batch, count, problem.chunks, channels, states)
    problem.forward(None, entering, dict.fromkeys(("so_b", "so_k", "so_t", "so_c"), 0))
    grad_x, strides = problem.map_buffer()
    # What no step reads gets no gradient.
    unread = not problem.complete
    by_route = (batch, problem.cells, problem.routes)
    grad_B, grad_C = (empty(problem.tiles, *by_route, states, zeros=unread) for _ in range(2))
    if problem.rank:
        grad_delta = empty(problem.tiles, *by_route, problem.rank, zeros=unread)
    else:
        make = x.new_zeros if unread else x.new_empty
        grad_delta = make((*by_route, channels), dtype=torch.float32 if problem.routes != count else delta.dtype)
    grad_A = empty(batch, count, channels, states)
    grad_weight = empty(batch, count, channels, problem.rank) if problem.rank else None
    grad_D, grad_bias = (None if y is None else empty(batch, count, channels) for y in (D, delta_bias))
    grad_out = grad_out.flatten(1, 2)
    route_stride = grad_out.stride(2) if merge == "none" else 0
    launch(
        backward_kernel,
        problem.grid,
        **problem.arguments,
        **strides,
        p_states=entering,
        p_grad=grad_out,
        p_dx=grad_x,
        p_ddelta=grad_delta,
        p_dweight=grad_weight,
        p_dA=grad_A,
        p_dB=grad_B,
        p_dC=grad_C,
        p_dD=grad_D,
        p_dbias=grad_bias,
        scale=1 / problem.routes if merge == "mean" else 1.0,
        routes=problem.routes,
        sg_b=grad_out.stride(0),
        sg_t=grad_out.stride(1),
        sg_k=route_stride,
        sg_c=grad_out.stride(-1),
        PRECISION=problem.precision,
        num_warps=1,
        passes=problem.passes | {"p_grad": 1 if merge == "none" else count},
        flops=problem.size * (19 * states + 6 + 6 * problem.rank),
    )
    nothing = x.new_empty(0)
    return (
        problem.merged_map(grad_x),
        problem.by_order(grad_delta.sum(0) if problem.rank else grad_delta, delta),
        nothing if grad_weight is None else grad_weight.sum(0).to(delta_weight.dtype),
        grad_A.sum(0).to(A.dtype),
        problem.by_order(grad_B.sum(0), B),
        problem.by_order(grad_C.sum(0), C),
        nothing if grad_D is None else grad_D.sum(0).to(D.dtype),
        nothing if grad_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
    )
