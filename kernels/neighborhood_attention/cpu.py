"""Neighborhood attention in compiled C++, in float32; half precision is read and written as it lies.

Where the processor multiplies pairs of bfloat16 (AVX512-BF16), scores and sums of values of such tensors are made of
them, with the weights rounded to it. Float64 goes to the PyTorch reference.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.neighborhood_attention import reference
from visionmix.kernels.neighborhood_attention.schema import Arguments, Gradients, mixed_tensors

_SOURCE = Path(__file__).with_name("cpu.cpp")
_AXES = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    """The call's sizes and window; a map of fewer than three axes gets leading axes of one token."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "dk", "dv", "extra")),
        *((name, _AXES) for name in ("grid", "kernel_size", "stride", "dilation", "is_causal")),
        ("circular", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class _View(ctypes.Structure):
    """A tensor (batch, levels, rows, columns, heads, dim) of a kind: strides in elements, the last one 1."""

    _fields_ = [
        *(("data", ctypes.c_void_p), ("kind", ctypes.c_int64), ("batch", ctypes.c_int64)),
        *(("axis", _AXES), ("head", ctypes.c_int64)),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE, _Problem, _View)
    problem, view, pointer = ctypes.POINTER(_Problem), ctypes.POINTER(_View), ctypes.c_void_p
    library.na_forward.argtypes = [problem] + [view] * 3 + [pointer] * 5
    library.na_backward.argtypes = [problem] + [view] * 4 + [pointer] * 12
    return library


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _view(x: Tensor) -> _View:
    batch, *axes, head, _ = x.stride()
    return _View(x.data_ptr(), native.KINDS[x.dtype], batch, _AXES(*[0] * (3 - len(axes)), *axes), head)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _empty(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _problem(a: Arguments) -> _Problem:
    batch, *grid, heads, dk = a.query.shape
    extra = 0 if a.additional_keys is None else a.additional_keys.shape[1]
    lead = [1] * (3 - len(grid))
    axes = (_AXES(*lead, *values) for values in (grid, a.kernel_size, a.stride, a.dilation))
    causal = _AXES(*[0] * len(lead), *a.is_causal)
    key_heads, dv = a.value.shape[-2:]
    return _Problem(batch, heads, key_heads, dk, dv, extra, *axes, causal, a.circular, native.threads(), a.scale)


def _succeed(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for the scratch space of neighborhood_attention")


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp of the scores); shapes as `na2d`."""
    tensors = mixed_tensors(a)
    if native.leaves_to_reference("neighborhood_attention", *tensors):
        return reference.forward(a)
    inputs = [native.with_dense_rows(x) for x in tensors[:3]]
    out = torch.empty((*a.query.shape[:-1], a.value.shape[-1]), dtype=inputs[2].dtype)
    lse = torch.empty(a.query.shape[:-1], dtype=torch.float32)
    options = [_dense(x) for x in tensors[3:]]
    pointers = (*map(_pointer, options), out.data_ptr(), lse.data_ptr())
    _succeed(_library().na_forward(_problem(a), *map(_view, inputs), *pointers))
    return out.to(a.value.dtype), lse


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value and the three options (empty where there is none), in their dtypes."""
    tensors = mixed_tensors(a)
    if native.leaves_to_reference("neighborhood_attention", *tensors):
        return reference.backward(a, gradients)
    inputs = [native.with_dense_rows(x) for x in (*tensors[:3], gradients.grad_out)]
    if a.additional_keys is not None:  # whose gradients are gathered from float32 queries
        inputs[0], inputs[3] = inputs[0].float(), inputs[3].float()
    options = [_dense(x) for x in tensors[3:]]
    out = gradients.out.to(inputs[2].dtype).contiguous()
    numbers = [*options, out, _dense(gradients.lse), _dense(gradients.grad_lse)]
    grads = [_empty(x) for x in (*inputs[:3], *options)]
    pointers = (*map(_pointer, numbers), *map(_pointer, grads))
    _succeed(_library().na_backward(_problem(a), *map(_view, inputs), *pointers))
    return tuple(
        a.query.new_empty(0) if grad is None else grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True)
    )


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `neighborhood_attention`."""
    _library()
    return dispatch.Implementation(forward, backward)
