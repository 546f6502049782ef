"""The selective scan over several orders of a map in compiled C++, computed in float32.

Maps of half precision are read and written where they lie; parameters are converted. Float64 goes to the PyTorch
reference.
"""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.selective_scan.cpu import chunk_steps
from visionmix.kernels.selective_scan_2d import reference
from visionmix.kernels.selective_scan_2d.routes import routes
from visionmix.kernels.selective_scan_2d.schema import SCHEMA, Arguments, Gradients

_SOURCE = Path(__file__).with_name("cpu.cpp")
_CHUNK = 64  # the longest chunk of the library


class _Map(ctypes.Structure):
    """A tensor (batch, cells, orders, features) or (batch, cells, features), features dense: strides, and its type."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "cell", "order", "kind")]


_MAPS = ("x", "delta", "B", "C", "grad_out", "out", "grad_x", "grad_delta")
_DENSE = (
    *("delta_weight", "A", "D", "delta_bias"),
    *("grad_weight", "grad_A", "grad_D", "grad_bias", "grad_B", "grad_C", "grad_rank", "entering"),
    *("read", "place", "target", "gaps", "counts", "first"),
)
_NUMBERS = ("batch", "cells", "channels", "states", "rank", "orders", "steps", "rows", "tables", "chunk", "softplus")
_NUMBERS += ("threads",)


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, _Map) for name in _MAPS),
        *((name, ctypes.c_void_p) for name in _DENSE),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE, _Map, _Arguments)
    for name in ("selective_scan_2d_forward", "selective_scan_2d_backward"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Arguments)]
    return library


@dataclass(frozen=True)
class _Table:
    """The steps of K orders as the library reads them.

    Attributes:
        arguments: The arguments that hold these steps and their sizes; a call starts from a copy.
        arrays: What the arguments point to: `read`, `place` and `target`, int32 (K, steps), or (batch, K, steps) where
            each image has its own, the cell of x that a step reads, that of delta, B and C, and the row of the output
            that takes it back, -1 for none; `counts`, int64 (K,), the steps that matter, since padding at the end does
            not; and `first`, int32 (3, K), whether an order is the first to reach every cell of x, of its own delta, B
            and C, and every row of the output, each of them once. Rows are cells, or cells x routes.
        routes: The number of routes.
    """

    arguments: _Arguments
    arrays: tuple[np.ndarray, ...]
    routes: int


@lru_cache(maxsize=64)
def _table(orders: str, height: int, width: int, permute: str, apart: bool) -> _Table:
    """Return the table of orders, whose routes have rows of their own in the output if `apart`, else common ones."""
    table = routes(orders, height, width, permute)
    count, cells = table.inverse.shape
    # An order's inverse names each of its steps at most once.
    (back,) = table.inverse_back
    route, cell = np.divmod(back, cells)
    target = np.where(back < 0, -1, cell * count + route if apart else cell).reshape(table.index.shape)
    used = (table.index >= 0) | (target >= 0)
    counts = used.shape[1] - np.argmax(used[:, ::-1], axis=1)
    place = np.where(np.arange(used.shape[1]) < counts[:, None], table.place, -1)
    first = np.zeros((3, len(used)), np.int32)
    first[0, 0] = _covers(table.index[0], cells)
    first[1] = [_covers(order, cells) for order in place]
    if apart:
        first[2] = _covers(target, cells * count)
    else:
        first[2, 0] = _covers(target[0], cells)
    arguments = _Arguments(cells=cells, rows=cells * count if apart else cells)
    return _filled(arguments, (table.index, place, target), counts.astype(np.int64), first, count)


def _given_table(a: Arguments) -> _Table:
    """Return the table of the steps that `cells` gives, (batch, K, steps), each image's own."""
    cells = a.x.shape[1] * a.x.shape[2]
    _, count, steps = a.cells.shape
    read = a.cells.numpy()
    place = read if a.permute == "all" else np.broadcast_to(np.arange(steps), read.shape)
    apart = a.merge == "none"
    target = np.where(read < 0, -1, read * count + np.arange(count)[:, None]) if apart else read
    # No order is known to be the first that reaches a place.
    counts, first = np.full(count, steps, np.int64), np.zeros((3, count), np.int32)
    arguments = _Arguments(cells=cells, rows=cells * count if apart else cells, tables=count * steps)
    return _filled(arguments, (read, place, target), counts, first, count)


def _filled(
    arguments: _Arguments, tables: tuple[np.ndarray, ...], counts: np.ndarray, first: np.ndarray, routes: int
) -> _Table:
    """Return the table of the three `tables` (..., K, steps), with `arguments` that point to them."""
    arguments.orders, arguments.steps = tables[0].shape[-2:]
    arrays = (*map(_padded, tables), counts, first)
    for name, array in zip(("read", "place", "target", "counts", "first"), arrays, strict=True):
        setattr(arguments, name, array.ctypes.data)
    return _Table(arguments, arrays, routes)


def _covers(table: np.ndarray, size: int) -> bool:
    """Return whether the table names every one of `size` places, each once."""
    named = table[table >= 0]
    return len(named) == size == len(np.unique(named))


def _padded(table: np.ndarray) -> np.ndarray:
    """Return the table as int32, with memory for one more chunk after its end, where the library prefetches cells."""
    padded = np.zeros(table.size + _CHUNK, np.int32)
    padded[: table.size] = table.reshape(-1)
    return padded[: table.size].reshape(table.shape)


def entering_shape(x: Tensor, A: Tensor, steps: int) -> tuple[int, ...]:
    """Return the shape of the states entering the chunks of each order, which are kept for the backward pass.

    `steps` are those of the longest order; (batch, orders * chunks * states * channels), since a graph with an axis of
    chunks would serve either one chunk or more.
    """
    orders, channels, states = A.shape
    chunk = chunk_steps(states)
    return x.shape[0], orders * ((steps + chunk - 1) // chunk) * states * channels


class _Call:
    """The arguments in the form that the library takes; keeps the converted tensors alive."""

    def __init__(self, a: Arguments):
        batch, height, width, channels = a.x.shape
        if a.cells is None:
            self.table = _table(a.orders, height, width, a.permute, a.merge == "none")
        else:
            self.table = _given_table(a)
        self.arguments = arguments = _Arguments.from_buffer_copy(self.table.arguments)
        arguments.batch = batch
        arguments.channels = channels
        arguments.states = a.A.shape[2]
        arguments.rank = 0 if a.delta_weight is None else a.delta_weight.shape[2]
        arguments.chunk = chunk_steps(a.A.shape[2])
        arguments.softplus = a.delta_softplus
        arguments.threads = native.threads()
        arguments.scale = 1 / self.table.routes if a.merge == "mean" else 1
        self.tensors = []
        for name, y in (("x", a.x), ("delta", a.delta), ("B", a.B), ("C", a.C)):
            self.set_map(name, y)
        for name, y in (("delta_weight", a.delta_weight), ("A", a.A), ("D", a.D), ("delta_bias", a.delta_bias)):
            if y is not None:
                self.set_dense(name, y)
        if a.gaps is not None:
            self.set_dense("gaps", a.gaps)

    def set_map(self, name: str, x: Tensor) -> None:
        """Set a tensor (batch, height, width, features) or (batch, height, width, orders, features)."""
        x, cell = native.with_joint_cells(x)
        order = x.stride(3) if x.dim() == 5 else 0
        setattr(self.arguments, name, _Map(x.data_ptr(), x.stride(0), cell, order, native.KINDS[x.dtype]))
        self.tensors.append(x)

    def set_dense(self, name: str, x: Tensor) -> None:
        """Set a float32 tensor that is read, or written, in its own order."""
        x = x.float().contiguous()
        setattr(self.arguments, name, x.data_ptr())
        self.tensors.append(x)

    def set_rows(self, name: str, x: Tensor) -> None:
        """Set the output or its gradient, whose rows are (cells,) or (cells x routes,)."""
        x = native.readable(x).contiguous()
        batch = x[0].numel() if len(x) else 0
        setattr(self.arguments, name, _Map(x.data_ptr(), batch, x.shape[-1], 0, native.KINDS[x.dtype]))
        self.tensors.append(x)

    def run(self, function: str) -> None:
        if getattr(_library(), function)(ctypes.byref(self.arguments)):
            raise MemoryError("not enough memory for the scratch space of selective_scan_2d")


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the merged outputs, and the states entering the chunks, empty unless asked for.

    Shapes as `selective_scan_2d`, the order names joined by commas, and `entering_shape`.
    """
    x = a.x
    if native.leaves_to_reference("selective_scan_2d", *SCHEMA.input_tensors(a)):
        return reference.forward(a)
    call = _Call(a)
    shape = (*x.shape[:3], call.table.routes, x.shape[3]) if a.merge == "none" else x.shape
    dtype = a.out_dtype or x.dtype
    out = torch.empty(shape, dtype=native.writable(dtype))
    call.set_rows("out", out)
    # Orders may have fewer chunks than the longest.
    kept = entering_shape(x, a.A, call.arguments.steps) if a.keep_states else 0
    entering = torch.zeros(kept, dtype=torch.float32)
    if a.keep_states:
        call.set_dense("entering", entering)
    call.run("selective_scan_2d_forward")
    return out.to(dtype), entering


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of the eight tensors of the input, in their dtypes, empty for what is None.

    The states entering the chunks are found again where the forward pass did not keep them.
    """
    tensors = SCHEMA.input_tensors(a)
    if native.leaves_to_reference("selective_scan_2d", *tensors):
        return reference.backward(a, gradients)
    x, (grad_out, entering) = a.x, gradients
    if entering is None or entering.dim() == 1:
        _, entering = forward(a._replace(keep_states=True))
    call = _Call(a)
    call.set_dense("entering", entering)
    call.set_rows("grad_out", grad_out)
    names = ("x", "delta" if a.delta_weight is None else "rank", "weight", "A", "B", "C", "D", "bias")
    grads = []
    for name, y in zip(names, tensors, strict=True):
        if y is None:
            grads.append(None)
            continue
        if name in ("x", "delta"):
            grads.append(torch.empty(y.shape, dtype=native.writable(y.dtype)))
            call.set_map(f"grad_{name}", grads[-1])
            continue
        if name in ("rank", "B", "C"):  # added to
            grads.append(torch.zeros(y.shape, dtype=torch.float32))
        else:
            # Gradients of parameters come with an axis of images, summed here in one order.
            grads.append(torch.empty((len(x), *y.shape), dtype=torch.float32))
        call.set_dense(f"grad_{name}", grads[-1])
    call.run("selective_scan_2d_backward")
    return tuple(
        x.new_empty(0) if y is None else (grad if grad.dim() == y.dim() else grad.sum(0)).to(y.dtype)
        for y, grad in zip(tensors, grads, strict=True)
    )


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `selective_scan_2d`."""
    _library()
    return dispatch.Implementation(forward, backward)
