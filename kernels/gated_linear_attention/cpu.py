"""Gated linear attention in compiled C++, which computes in float32 and reads and writes half precision as it lies.

Float64 goes to the PyTorch reference.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.gated_linear_attention import reference
from visionmix.kernels.gated_linear_attention.schema import (
    BIDIRECTIONAL_SCHEMA,
    Arguments,
    BidirectionalArguments,
    BidirectionalGradients,
    Gradients,
)

_SOURCE = Path(__file__).with_name("cpu.cpp")


class _View(ctypes.Structure):
    """A tensor (batch, length, heads, dim) of one of `native.KINDS`: strides in elements, the last one 1."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
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
    return ctypes.byref(_View() if x is None else _View(x.data_ptr(), native.KINDS[x.dtype], *x.stride()[:3]))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sizes(q: Tensor, v: Tensor) -> object:
    return ctypes.byref(_Sizes(*q.shape, v.shape[-1]))


def _empty(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(x.shape, dtype=native.writable(dtype), device=x.device)


def _succeed(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for the scratch space of gated_linear_attention")


def _run_forward(
    tensors: list[Tensor], scale: float, initial: Tensor | None, last: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the output in `dtype` for q, k, v and one or two gates; the final state goes to `last`."""
    out = _empty(tensors[2], dtype)
    inputs = [native.with_dense_rows(x) for x in tensors]
    views = [_view(x) for x in (*inputs, None)[:5]]
    initial = None if initial is None else initial.float().contiguous()
    sizes = _sizes(inputs[0], inputs[2])
    tail = (_view(out), _pointer(last), sizes, scale, native.threads())
    _succeed(_library().gla_forward(*views, _pointer(initial), *tail))
    return out.to(dtype)


def _run_backward(
    tensors: list[Tensor],
    scale: float,
    initial: Tensor | None,
    grad_out: Tensor,
    grad_last: Tensor | None,
    grad_initial: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of q, k, v and the gates in their dtypes; that of the initial state goes to its tensor."""
    # Those of q, k and v are sums that the kernel makes in memory, in float32.
    grads = [_empty(x) for x in tensors[:3]] + [_empty(g, g.dtype) for g in tensors[3:]]
    grad_out, *inputs = (native.with_dense_rows(x) for x in (grad_out, *tensors))
    initial, grad_last = (None if x is None else x.float().contiguous() for x in (initial, grad_last))
    views, grad_views = ([_view(x) for x in (*each, None)[:5]] for each in (inputs, grads))
    head = (_view(grad_out), _pointer(grad_last), *views, _pointer(initial), *grad_views, _pointer(grad_initial))
    _succeed(_library().gla_backward(*head, _sizes(inputs[0], inputs[2]), scale, native.threads()))
    return [grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True)]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, final state), the state empty unless asked for; shapes as `gated_linear_attention`."""
    tensors = [a.q, a.k, a.v, a.g]
    if native.leaves_to_reference("gated_linear_attention", *tensors, a.initial_state):
        return reference.forward(a)
    batch, _, heads, dk = a.q.shape
    state = a.q.new_empty((batch, heads, dk, a.v.shape[-1]) if a.output_final_state else 0, dtype=torch.float32)
    last = state if a.output_final_state else None
    return _run_forward(tensors, a.scale, a.initial_state, last, a.v.dtype), state


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and initial_state (empty where there is none), in their dtypes."""
    tensors, initial = [a.q, a.k, a.v, a.g], a.initial_state
    if native.leaves_to_reference("gated_linear_attention", *tensors, initial):
        return reference.backward(a, gradients)
    grad_initial = None if initial is None else _empty(initial)
    grads = _run_backward(tensors, a.scale, initial, *gradients, grad_initial)
    return *grads, a.q.new_empty(0) if grad_initial is None else grad_initial.to(initial.dtype)


def bidirectional_forward(a: BidirectionalArguments) -> Tensor:
    """Return the merged output of both directions; shapes as `bidirectional_gated_linear_attention`."""
    tensors = BIDIRECTIONAL_SCHEMA.input_tensors(a)
    if native.leaves_to_reference("gated_linear_attention", *tensors):
        return reference.bidirectional_forward(a)
    return _run_forward(tensors, reference.merged(a), None, None, a.out_dtype or a.v.dtype)


def bidirectional_backward(a: BidirectionalArguments, gradients: BidirectionalGradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g_forward and g_backward, in their dtypes."""
    tensors = BIDIRECTIONAL_SCHEMA.input_tensors(a)
    if native.leaves_to_reference("gated_linear_attention", *tensors):
        return reference.bidirectional_backward(a, gradients)
    return tuple(_run_backward(tensors, reference.merged(a), None, gradients.grad_out, None, None))


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `gated_linear_attention`."""
    _library()
    return dispatch.Implementation(forward, backward)


def load_bidirectional() -> dispatch.Implementation:
    """Compile, and return the functions of `bidirectional_gated_linear_attention`."""
    _library()
    return dispatch.Implementation(bidirectional_forward, bidirectional_backward)
