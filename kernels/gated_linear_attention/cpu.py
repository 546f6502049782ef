"""Gated linear attention in compiled C++, float32; half precision is converted at the edges.

Float64 goes to the PyTorch reference.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.gated_linear_attention import reference

_SOURCE = Path(__file__).with_name("cpu.cpp")


class _View(ctypes.Structure):
    """A float32 tensor (batch, length, heads, dim): strides in elements, the last one 1."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "heads", "dk", "dv")]


@cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE, _View, _Sizes)
    view, state = ctypes.POINTER(_View), ctypes.c_void_p
    tail = [ctypes.POINTER(_Sizes), ctypes.c_float, ctypes.c_int]
    library.gla_forward.argtypes = [view] * 5 + [state, view, state, *tail]
    library.gla_backward.argtypes = [view, state] + [view] * 5 + [state] + [view] * 5 + [state, *tail]
    return library


def _view(x: Tensor | None) -> object:
    return ctypes.byref(_View(None, 0, 0, 0) if x is None else _View(x.data_ptr(), *x.stride()[:3]))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sizes(q: Tensor, v: Tensor) -> object:
    return ctypes.byref(_Sizes(*q.shape, v.shape[-1]))


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _succeed(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for the scratch space of gated_linear_attention")


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor | None],
    scale: float,
    initial: Tensor | None,
    last: Tensor | None,
) -> Tensor:
    out = _empty(v)
    q, k, v = native.with_dense_rows(q), native.with_dense_rows(k), native.with_dense_rows(v)
    gates = [None if g is None else native.with_dense_rows(g) for g in gates]
    initial = None if initial is None else initial.float().contiguous()
    status = _library().gla_forward(
        _view(q),
        _view(k),
        _view(v),
        _view(gates[0]),
        _view(gates[1]),
        _pointer(initial),
        _view(out),
        _pointer(last),
        _sizes(q, v),
        scale,
        native.threads(),
    )
    _succeed(status)
    return out


def _run_backward(
    grad_out: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor | None],
    scale: float,
    initial: Tensor | None,
    grad_initial: Tensor | None,
) -> list[Tensor]:
    inputs = [q, k, v, *(g for g in gates if g is not None)]
    grads = [_empty(x) for x in inputs]
    grad_out, q, k, v = (
        native.with_dense_rows(grad_out),
        native.with_dense_rows(q),
        native.with_dense_rows(k),
        native.with_dense_rows(v),
    )
    gates = [None if g is None else native.with_dense_rows(g) for g in gates]
    initial, grad_last = (None if x is None else x.float().contiguous() for x in (initial, grad_last))
    views = [_view(grad) for grad in grads]
    status = _library().gla_backward(
        _view(grad_out),
        _pointer(grad_last),
        _view(q),
        _view(k),
        _view(v),
        _view(gates[0]),
        _view(gates[1]),
        _pointer(initial),
        *(views if gates[1] is not None else [*views, _view(None)]),
        _pointer(grad_initial),
        _sizes(q, v),
        scale,
        native.threads(),
    )
    _succeed(status)
    return [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """Return (output, final state), the state empty unless asked for; shapes as `gated_linear_attention`."""
    if native.leaves_to_reference("gated_linear_attention", q, k, v, g, initial_state):
        return reference.forward(q, k, v, g, scale, initial_state, output_final_state)
    batch, _, heads, dk = q.shape
    state = q.new_empty((batch, heads, dk, v.shape[-1]) if output_final_state else 0, dtype=torch.float32)
    out = _run_forward(q, k, v, (g, None), scale, initial_state, state if output_final_state else None)
    return out.to(v.dtype), state


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g and initial_state (empty where there is none), in their dtypes."""
    if native.leaves_to_reference("gated_linear_attention", q, k, v, g, initial_state):
        return reference.backward(grad_out, grad_state, q, k, v, g, scale, initial_state)
    grad_initial = None if initial_state is None else _empty(initial_state)
    grads = _run_backward(grad_out, grad_state, q, k, v, (g, None), scale, initial_state, grad_initial)
    return *grads, q.new_empty(0) if grad_initial is None else grad_initial.to(initial_state.dtype)


def bidirectional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float,
    merge: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the merged output of both directions; shapes as `bidirectional_gated_linear_attention`."""
    if native.leaves_to_reference("gated_linear_attention", q, k, v, g_forward, g_backward):
        return reference.bidirectional_forward(q, k, v, g_forward, g_backward, scale, merge, out_dtype)
    out = _run_forward(q, k, v, (g_forward, g_backward), reference.merged(scale, merge), None, None)
    return out.to(out_dtype or v.dtype)


def bidirectional_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float,
    merge: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g_forward and g_backward, in their dtypes."""
    if native.leaves_to_reference("gated_linear_attention", q, k, v, g_forward, g_backward):
        return reference.bidirectional_backward(grad_out, q, k, v, g_forward, g_backward, scale, merge)
    gates = (g_forward, g_backward)
    return tuple(_run_backward(grad_out, None, q, k, v, gates, reference.merged(scale, merge), None, None))


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `gated_linear_attention`."""
    _library()
    return dispatch.Implementation(forward, backward)


def load_bidirectional() -> dispatch.Implementation:
    """Compile, and return the functions of `bidirectional_gated_linear_attention`."""
    _library()
    return dispatch.Implementation(bidirectional_forward, bidirectional_backward)
