"""The selective scan in compiled C++, computed in float32.

Sequences of half precision are read and written where they lie; parameters are converted. Float64 goes to the PyTorch
reference.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.selective_scan import reference
from visionmix.kernels.selective_scan.schema import SCHEMA, Arguments, Gradients

_SOURCE = Path(__file__).with_name("cpu.cpp")


class _Signal(ctypes.Structure):
    """A tensor (batch, channels, time): strides in elements, and its type."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "channel", "time", "kind")]


class _Input(ctypes.Structure):
    """B or C: (batch, groups, states, time), or float32 (channels, states) without gaps."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "group", "state", "time", "kind", "constant")
    ]


_SIGNALS = ("u", "delta", "z", "gap", "grad_out", "out", "grad_u", "grad_delta", "grad_z", "grad_gap")
_INPUTS = ("B", "C")
_TENSORS = [SCHEMA.Arguments._fields[place] for place in SCHEMA.tensors]
_DENSE = ("A", "D", "delta_bias", "grad_state", "state", "entering")
_DENSE += ("grad_A", "grad_B", "grad_C", "grad_D", "grad_delta_bias")
_NUMBERS = ("batch", "dim", "length", "states", "groups", "chunk", "softplus", "threads")


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, _Signal) for name in _SIGNALS),
        *((name, _Input) for name in _INPUTS),
        *((name, ctypes.c_void_p) for name in _DENSE),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE, _Signal, _Input, _Arguments)
    for function in (library.selective_scan_parts, library.selective_scan_forward, library.selective_scan_backward):
        function.argtypes = [ctypes.POINTER(_Arguments)]
    library.selective_scan_parts.restype = ctypes.c_int64
    return library


def chunk_steps(states: int) -> int:
    """Return the number of steps between states that are kept: together they are about as large as an input."""
    return 64 if states <= 4 else 32 if states <= 8 else 16


def entering_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states entering the chunks, kept for the backward pass: (batch, chunks * states * dim).

    A graph with an axis of chunks would serve either one chunk or more.
    """
    batch, dim, length = u.shape
    chunk = chunk_steps(A.shape[1])
    return batch, (length + chunk - 1) // chunk * A.shape[1] * dim


class _Call:
    """The arguments in the form that the library takes; keeps the converted tensors alive."""

    def __init__(self, a: Arguments, **others: Tensor | None):
        groups = a.B.shape[1] if a.B.dim() == 4 else a.C.shape[1] if a.C.dim() == 4 else 1
        states = a.A.shape[1]
        numbers = (*a.u.shape, states, groups, chunk_steps(states), a.delta_softplus, native.threads())
        self.arguments = _Arguments(**dict(zip(_NUMBERS, numbers, strict=True)))
        self.tensors = []
        for name, x in zip(_TENSORS, SCHEMA.input_tensors(a), strict=True):
            if x is not None:
                self.set(name, x)
        for name, x in others.items():
            if x is not None:
                self.set(name, x)

    def set(self, name: str, x: Tensor) -> None:
        if name in _SIGNALS:
            x = native.readable(x)
            value = _Signal(x.data_ptr(), *x.stride(), native.KINDS[x.dtype])
        elif name in _INPUTS and x.dim() == 4:
            x = native.readable(x)
            value = _Input(x.data_ptr(), *x.stride(), native.KINDS[x.dtype], 0)
        else:
            x = x.float().contiguous()
            value = _Input(x.data_ptr(), constant=1) if name in _INPUTS else x.data_ptr()
        setattr(self.arguments, name, value)
        self.tensors.append(x)

    def parts(self) -> int:
        return _library().selective_scan_parts(ctypes.byref(self.arguments))

    def run(self, function: str) -> None:
        if getattr(_library(), function)(ctypes.byref(self.arguments)):
            raise MemoryError("not enough memory for the scratch space of selective_scan")


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, last state, states entering the chunks), the latter two empty unless asked for.

    Shapes as `selective_scan`, and `entering_shape`.
    """
    if native.leaves_to_reference("selective_scan", *SCHEMA.input_tensors(a)):
        return reference.forward(a)
    u, A = a.u, a.A
    dtype = a.out_dtype or u.dtype
    out = torch.empty(u.shape, dtype=native.writable(dtype))
    state = torch.empty((*u.shape[:2], A.shape[1]) if a.return_last_state else 0, dtype=torch.float32)
    entering = torch.empty(entering_shape(u, A) if a.keep_states else 0, dtype=torch.float32)
    others = {"state": state if a.return_last_state else None, "entering": entering if a.keep_states else None}
    _Call(a, out=out, **others).run("selective_scan_forward")
    return out.to(dtype), state, entering


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and gap in their dtypes, empty for what is None.

    The states entering the chunks are found again where the forward pass did not keep them.
    """
    tensors = SCHEMA.input_tensors(a)
    if native.leaves_to_reference("selective_scan", *tensors):
        return reference.backward(a, gradients)
    grad_out, grad_state, entering = gradients
    if entering is None or entering.dim() == 1:
        *_, entering = forward(a._replace(keep_states=True, return_last_state=False))
    call = _Call(a, grad_out=grad_out, grad_state=grad_state, entering=entering)
    parts = call.parts()
    grads = []
    for name, x in zip(_TENSORS, tensors, strict=True):
        if x is None:
            grads.append(None)
            continue
        if name in _SIGNALS:
            grads.append(torch.empty(x.shape, dtype=native.writable(x.dtype)))
        else:
            # Gradients that several tasks add to come in parts along an axis of their own, summed here in one order.
            leading = parts if x.dim() == 4 else len(a.u)
            grads.append(torch.empty((leading, *x.shape), dtype=torch.float32))
        call.set(f"grad_{name}", grads[-1])
    call.run("selective_scan_backward")
    return tuple(
        a.u.new_empty(0) if x is None else (grad if grad.dim() == x.dim() else grad.sum(0)).to(x.dtype)
        for x, grad in zip(tensors, grads, strict=True)
    )


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `selective_scan`."""
    _library()
    return dispatch.Implementation(forward, backward)
