"""The selective scan over several orders of a map in Triton: every order reads the map in place.

A table of slots says which cell each step of an order reads and to which route its output belongs, so no tensor is
permuted; a low-rank delta is multiplied out tile by tile. Chunks run in parallel, in three launches: `ends_kernel`
finds what each makes of a state of 0, `carries_kernel` what enters each, `outputs_kernel` the outputs. Where every
order comes with its reverse, a program takes both directions of a chunk and sums them; other orders, one launch after
the other, add to the same map. The backward pass does the same from behind, with the states that the forward pass
kept. What programs share goes to partial buffers, which are summed here: no atomics, so that gradients repeat bit by
bit.

Liu et al., 2024, VMamba: Visual State Space Model (arXiv 2401.10166).
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from visionmix.kernels.dispatch import log_slow_path
from visionmix.kernels.gpu import dot_precision, launch, target
from visionmix.kernels.selective_scan_2d import reference
from visionmix.kernels.selective_scan_2d.chunks import CHUNK, entering_shape
from visionmix.kernels.selective_scan_2d.routes import routes, steps_of
from visionmix.kernels.selective_scan_2d.schema import SCHEMA, Arguments, Gradients
from visionmix.kernels.selective_scan_2d.triton_kernels import (
    RANKS,
    Constants,
    Sizes,
    Strides,
    carries_kernel,
    ends_kernel,
    gradients_kernel,
    outputs_kernel,
)
from visionmix.scans.order_names import count_routes, split_orders

_logger = logging.getLogger("visionmix.kernels")

# Channels of a program: a wide tile reads cells, B and C once for twice the channels, but may have more that are none.
# Registers hold it where products are of half precision.
_NARROW, _WIDE = 32, 64

# Programs that a launch of `gradients_kernel` should have: a program adds up its chunks' gradients of the parameters.
_ENOUGH_PROGRAMS = 4096


class _Table(NamedTuple):
    """The steps of K orders.

    Attributes:
        slots: int32 (K, steps), route x cells + cell or -1; cells where every order is one route.
        per_order: the routes of each order.
        pairs: the numbers of each order and its reverse; empty unless all come in such pairs.
        covers: whether every route reads every cell.
    """

    slots: np.ndarray
    per_order: list[int]
    pairs: list[tuple[int, int]]
    covers: bool


@lru_cache(maxsize=64)
def _table(orders: str, height: int, width: int) -> _Table | None:
    """Return the table of orders.

    None if a step that reads a cell does not give its output back to that cell, once.
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
    joined = max(per_order) > 1
    if not joined:
        slots = table.index
    return _Table(slots.astype(np.int32), per_order, [] if joined else _pairs(slots), len(named) == len(taken))


def _pairs(slots: np.ndarray) -> list[tuple[int, int]]:
    """Return the rows of which one is the other reversed, or nothing if a row has no such partner."""
    left, pairs = list(range(len(slots))), []
    while left:
        row = left.pop(0)
        reverse = next((other for other in left if np.array_equal(slots[other], slots[row][::-1])), None)
        if reverse is None:
            return []
        left.remove(reverse)
        pairs.append((row, reverse))
    return pairs


@lru_cache(maxsize=64)
def _on_device(orders: str, height: int, width: int, paired: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sequences of slots, int32 (sequences, steps), and the orders they serve, int32 (sequences, 1 or 2)."""
    table = _table(orders, height, width)
    sets = table.pairs if paired else [(row,) for row in range(len(table.slots))]
    first = [numbers[0] for numbers in sets]
    return torch.tensor(table.slots[first], device=device), torch.tensor(sets, dtype=torch.int32, device=device)


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
    if a.cells is None and _table(a.orders, a.x.shape[1], a.x.shape[2]) is None:
        _log_reference(a.orders)
        return True
    return False


def _filled_up(weight: Tensor) -> Tensor:
    """Return weights (K, channels, rank) with rows filled up with zeros to a multiple of RANKS, one after the other."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[2] % RANKS.value)).contiguous()


class _Problem:
    """Sizes, tables and the arguments that the kernels take."""

    def __init__(self, a: Arguments):
        x, delta, weight, A, B, C, D, bias = SCHEMA.input_tensors(a)
        self.like = x
        batch, height, width, channels = x.shape
        self.rank = 0 if weight is None else weight.shape[2]
        self.own = a.cells is not None
        if self.own:
            orders, steps = a.cells.shape[1:]
            self.per_order, self.covers, padded = [1] * orders, False, True
            self.slots = a.cells.int().contiguous()
            self.orders = torch.arange(orders, dtype=torch.int32, device=x.device).unsqueeze(1)
        else:
            table = _table(a.orders, height, width)
            orders, steps = table.slots.shape
            self.per_order, self.covers, padded = table.per_order, table.covers, bool((table.slots < 0).any())
            # Outputs that are not merged are those of one direction each.
            paired = bool(table.pairs) and a.merge != "none"
            self.slots, self.orders = _on_device(a.orders, height, width, paired, x.device)
        self.gaps = None if a.gaps is None else a.gaps.int().contiguous()
        cells, count = height * width, sum(self.per_order)
        chunks = triton.cdiv(steps, CHUNK)
        self.size = Sizes(batch, steps, chunks, cells, channels, orders, count, slots=orders * steps if self.own else 0)
        joined = self.size.routes != orders
        self.scale = 1 / self.size.routes if a.merge == "mean" else None
        half = {y.dtype for y in (delta, weight) if y is not None} in ({torch.bfloat16}, {torch.float16})
        # One axis of cells: a view, unless a map's rows do not follow each other.
        x, delta, B, C = (y.flatten(1, 2) for y in (x, delta, B, C))
        self.constants = Constants(
            DIRECTIONS=self.orders.shape[1],
            N=A.shape[2],
            RANK=self.rank,
            BC=_WIDE if half and triton.cdiv(channels, _WIDE) * 3 < triton.cdiv(channels, _NARROW) * 2 else _NARROW,
            SOFTPLUS=a.delta_softplus,
            JOINED=joined,
            OWN=self.own,
            PADDED=padded,
            TAIL=steps % CHUNK != 0,
            INT64=self.needs_int64(x, delta, B, C),
            WIDENED=not half,
            PRECISION=dot_precision(x, delta, weight),
        )
        self.narrow = self.constants._replace(BC=_NARROW)
        self.strides = Strides((*x.stride(), 0), *(y.stride() for y in (delta, B, C, A)))
        self.tensors = {
            "p_x": x,
            "p_delta": delta,
            "p_weight": None if weight is None else _filled_up(weight),
            "p_A": A,
            "p_B": B,
            "p_C": C,
            "p_D": None if D is None else D.contiguous(),
            "p_bias": None if bias is None else bias.contiguous(),
        }
        self.values = batch * orders * steps * channels

    def needs_int64(self, *maps: Tensor) -> bool:
        """Return whether an offset within an image, of the inputs or of a gradient, can pass int32."""
        size = self.size
        largest = size.cells * size.routes * max(size.channels, self.rank)
        for y in maps:
            steps = zip(y.shape[1:], y.stride()[1:], strict=True)
            largest = max(largest, sum((size - 1) * stride for size, stride in steps))
        return largest >= 1 << 31

    def warps(self, kernel: Any) -> int:
        """Return the warps of a program: one makes fewer instructions, where its registers hold a chunk."""
        here, K = target(), self.constants
        if kernel is gradients_kernel:
            few = 0 < self.rank <= RANKS.value and K.N == 1 and K.PRECISION != "tf32x3"
            return 1 if few and (here.backend != "cuda" or here.arch <= 90) else 2
        many = self.rank > RANKS.value and K.PRECISION == "tf32x3"
        return 2 if kernel is outputs_kernel and many else 1

    def launch(
        self, kernel: Any, along: int, i: int | None, *, passes: dict[str, float], flops: int, **arguments: Any
    ) -> None:
        """Launch a kernel on the i-th sequence of slots, on all for None; the grid's first axis has `along` programs.

        `flops` are those of a step and channel.
        """
        # Registers hold no wide tile of gradients, nor of outputs where the last steps are masked.
        narrow = kernel is gradients_kernel or (kernel is outputs_kernel and self.constants.TAIL)
        size, K = self.size, self.narrow if narrow else self.constants
        sets = slice(None) if i is None else slice(i, i + 1)
        slots, gaps = (None if y is None else y[..., sets, :] for y in (self.slots, self.gaps))
        orders = self.orders[sets]
        given = self.tensors | {"p_slots": slots, "p_gaps": gaps, "p_orders": orders}
        given |= {"s": self.strides, "size": size, "K": K}
        used = kernel.arg_names
        # What has no channels is read once a tile of them.
        share, tiles = orders.numel() / size.orders, triton.cdiv(size.channels, K.BC)
        by_tile = dict.fromkeys(("p_B", "p_C", *(["p_delta"] if self.rank else [])), tiles * share)
        launch(
            kernel,
            (along, tiles, len(orders)),
            **{name: value for name, value in given.items() if name in used} | arguments,
            num_warps=self.warps(kernel),
            passes={"p_x": len(orders), "p_slots": tiles * (1 if self.own else size.batch), "p_gaps": tiles}
            | {"p_delta": share}
            | by_tile
            | passes,
            flops=round(self.values * share) * flops,
        )

    def entering(self, *, backward: bool = False, scale: float | None = None, **of_gradient: Any) -> Tensor:
        """Return what enters the chunks, the states or (backward) what flows back: (batch, K, chunks, N, channels)."""
        size, K = self.size, self.constants
        shape = (size.batch, size.orders, size.chunks, K.N, size.channels)
        ends, enter = (self.like.new_empty(shape, dtype=torch.float32) for _ in range(2))
        sums = self.like.new_empty((*shape[:3], size.channels), dtype=torch.float32)
        found = {"p_end": ends, "p_sum": sums, "BACKWARD": backward}
        flops = 5 * K.N + 1 + 2 * self.rank
        self.launch(
            ends_kernel, size.batch * size.chunks, None, passes={}, flops=flops, scale=scale, **found, **of_gradient
        )
        launch(
            carries_kernel,
            (size.batch, triton.cdiv(size.channels, K.BC), size.orders),
            p_A=self.tensors["p_A"],
            p_orders=self.orders,
            p_enter=enter,
            s_A=self.strides.A,
            size=size,
            K=K,
            **found,
            num_warps=1,
            passes={"p_sum": K.N},
            flops=3 * ends.numel(),
        )
        return enter

    def merged_map(self, run: Callable, number: int, dtype: torch.dtype) -> Tensor:
        """Return the sum of the orders' maps (batch, height, width, channels).

        `run(i, add, out, strides)` stores the i-th of a number of maps, or those of all routes for None, and adds `add`
        where it is given.
        """
        size, like = self.size, self.like
        make = like.new_empty if self.covers else like.new_zeros
        if size.routes != size.orders:
            # An order comes to a cell several times: its routes have maps of their own.
            maps = make((size.batch, size.cells, size.routes, size.channels), dtype=torch.float32)
            run(None, None, maps, map_strides(maps))
            return maps.sum(2).to(dtype).view(like.shape)
        shape = (size.batch, size.cells, size.channels)
        total = None if self.covers else make(shape, dtype=torch.float32)
        for i in range(number):
            wanted = dtype if self.covers and i == number - 1 else torch.float32
            out = total if total is not None and total.dtype == wanted else make(shape, dtype=wanted)
            run(i, total, out, (*out.stride(), 0))
            total = out
        return total.to(dtype).view(like.shape)

    def by_order(self, grad: Tensor, like: Tensor) -> Tensor:
        """Sum (batch, cells, routes, features) over the routes of each order, to the shape and dtype of `like`."""
        if self.size.routes != self.size.orders:
            grad = torch.stack([part.sum(2) for part in grad.split(self.per_order, 2)], 2)
        return grad.reshape(like.shape).to(like.dtype)


def map_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of a map (batch, cells, routes, channels) as the kernels take them, the routes' last."""
    return x.stride(0), x.stride(1), x.stride(3), x.stride(2)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the merged outputs, and the states entering the chunks, empty unless asked for.

    Shapes as `selective_scan_2d`, the order names joined by commas, and `entering_shape`.
    """
    x = a.x
    kept = entering_shape(x, a.A, steps_of(a)) if a.keep_states else (0,)
    if _leaves_to_reference(a):
        out, _ = reference.forward(a)
        return out, x.new_empty(kept, dtype=torch.float32)
    problem = _Problem(a)
    size, K = problem.size, problem.constants
    dtype = a.out_dtype or x.dtype
    entering = problem.entering()

    def run(i: int | None, add: Tensor | None, out: Tensor, strides: tuple[int, ...]) -> None:
        problem.launch(
            outputs_kernel,
            size.batch * size.chunks,
            i,
            p_enter=entering,
            p_add=add,
            p_out=out,
            scale=problem.scale,
            s_out=strides,
            passes={"p_enter": 1 if i is None else 1 / len(problem.orders)},
            flops=7 * K.N + 3 + 2 * problem.rank,
        )

    if a.merge == "none":
        make = x.new_empty if problem.covers else x.new_zeros
        out = make((*x.shape[:3], size.routes, size.channels), dtype=dtype)
        run(None, None, out, map_strides(out.flatten(1, 2)))
    else:
        out = problem.merged_map(run, len(problem.orders), dtype)
    return out, entering.view(kept) if a.keep_states else x.new_empty(0, dtype=torch.float32)


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of the eight tensors of the input, in their dtypes, empty for what is None.

    The states entering the chunks are found again where the forward pass did not keep them.
    """
    if _leaves_to_reference(a):
        return reference.backward(a, gradients)
    x, delta, delta_weight, A, B, C, D, delta_bias = SCHEMA.input_tensors(a)
    grad_out, entering = gradients
    problem = _Problem(a)
    size, K, scale = problem.size, problem.constants, problem.scale
    if entering is None or entering.dim() == 1:
        entering = problem.entering()
    grad_out = grad_out.flatten(1, 2)
    strides = map_strides(grad_out) if a.merge == "none" else (*grad_out.stride(), 0)
    of_gradient = {
        "p_x": grad_out,
        "p_B": C.flatten(1, 2),
        "s": problem.strides._replace(x=strides, B=problem.strides.C),
    }
    flow = problem.entering(backward=True, scale=scale, **of_gradient)
    tiles = triton.cdiv(size.channels, problem.narrow.BC)
    chunks = size.batch * size.chunks
    span = max(1, chunks * tiles // _ENOUGH_PROGRAMS)
    programs = triton.cdiv(chunks, span)

    def zeros(*shape: int) -> Tensor:
        return x.new_zeros(shape, dtype=torch.float32)

    # What no step reads gets no gradient.
    make = x.new_empty if problem.covers else x.new_zeros
    by_route = (size.batch, size.cells, size.routes)
    grad_B, grad_C = (make((tiles, *by_route, K.N), dtype=torch.float32) for _ in range(2))
    if problem.rank:
        grad_delta = make((tiles, *by_route, problem.rank), dtype=torch.float32)
    else:
        joined = size.routes != size.orders
        grad_delta = make((*by_route, size.channels), dtype=torch.float32 if joined else delta.dtype)
    parameters = (programs, size.orders)
    grad_A = zeros(*parameters, K.N, size.channels)
    grad_weight = zeros(*parameters, problem.rank, size.channels) if problem.rank else None
    grad_D, grad_bias = (None if y is None else zeros(*parameters, size.channels) for y in (D, delta_bias))
    partial = {
        "p_ddelta": grad_delta,
        "p_dweight": grad_weight,
        "p_dA": grad_A,
        "p_dB": grad_B,
        "p_dC": grad_C,
        "p_dD": grad_D,
        "p_dbias": grad_bias,
    }

    directions = K.DIRECTIONS

    def run(i: int | None, add: Tensor | None, out: Tensor, strides_out: tuple[int, ...]) -> None:
        share = 1 if i is None else 1 / size.orders
        problem.launch(
            gradients_kernel,
            programs,
            None if i is None else i // directions,
            p_enter=entering,
            p_flow=flow,
            p_grad=grad_out,
            p_add=add,
            p_dx=out,
            **partial,
            scale=scale,
            s_grad=strides,
            s_out=strides_out,
            span=span,
            BACK=i is not None and i % directions == 1,
            passes=dict.fromkeys(("p_enter", "p_flow", *partial), share)
            | {"p_grad": 1 if i is not None or a.merge == "none" else size.orders},
            flops=(19 * K.N + 6 + 6 * problem.rank) // directions,
        )

    grad_x = problem.merged_map(run, size.orders, x.dtype)
    nothing = x.new_empty(0)
    return (
        grad_x,
        problem.by_order(grad_delta.sum(0) if problem.rank else grad_delta, delta),
        nothing if grad_weight is None else grad_weight.sum(0).mT.to(delta_weight.dtype).contiguous(),
        grad_A.sum(0).mT.to(A.dtype).contiguous(),
        problem.by_order(grad_B.sum(0), B),
        problem.by_order(grad_C.sum(0), C),
        nothing if grad_D is None else grad_D.sum(0).to(D.dtype),
        nothing if grad_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
    )
