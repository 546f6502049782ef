"""The selective scan in compiled C++, float32; half precision is converted at the edges.

Float64 goes to the PyTorch reference.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from visionmix.kernels import dispatch, native
from visionmix.kernels.selective_scan import reference

_SOURCE = Path(__file__).with_name("cpu.cpp")


class _Signal(ctypes.Structure):
    """A float32 tensor (batch, channels, time): strides in elements."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "channel", "time")]


class _Input(ctypes.Structure):
    """B or C: float32 (batch, groups, states, time), or (channels, states) without gaps."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "group", "state", "time", "constant")
    ]


_SIGNALS = ("u", "delta", "z", "gap", "grad_out", "out", "grad_u", "grad_delta", "grad_z", "grad_gap")
_INPUTS = ("B", "C")
_DENSE = ("A", "D", "delta_bias", "grad_state", "state", "entering")
_DENSE += ("grad_A", "grad_B", "grad_C", "grad_D", "grad_bias")
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
    """Return after how many steps the states are kept: they are about as large as an input."""
    return 64 if states <= 4 else 32 if states <= 8 else 16


def entering_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states entering the chunks, kept for the way back: (batch, chunks * states * dim).

    A graph with an axis of chunks would serve either one chunk or more.
    """
    batch, dim, length = u.shape
    chunk = chunk_steps(A.shape[1])
    return batch, (length + chunk - 1) // chunk * A.shape[1] * dim


class _Call:
    """The arguments in the form that the library takes; keeps the converted tensors alive."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, **others: Tensor | None):
        groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        chunk = chunk_steps(A.shape[1])
        numbers = (*u.shape, A.shape[1], groups, chunk, delta_softplus, native.threads())
        self.arguments = _Arguments(**dict(zip(_NUMBERS, numbers, strict=True)))
        self.tensors = []
        tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias} | others
        for name, x in tensors.items():
            if x is not None:
                self.set(name, x)

    def set(self, name: str, x: Tensor) -> None:
        x = x.float()
        if name in _SIGNALS:
            value = _Signal(x.data_ptr(), *x.stride())
        elif name in _INPUTS and x.dim() == 4:
            value = _Input(x.data_ptr(), *x.stride(), 0)
        else:
            x = x.contiguous()
            value = _Input(x.data_ptr(), 0, 0, 0, 0, 1) if name in _INPUTS else x.data_ptr()
        setattr(self.arguments, name, value)
        self.tensors.append(x)

    def parts(self) -> int:
        return _library().selective_scan_parts(ctypes.byref(self.arguments))

    def run(self, function: str) -> None:
        if getattr(_library(), function)(ctypes.byref(self.arguments)):
            raise MemoryError("not enough memory for the scratch space of selective_scan")


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    gap: Tensor | None = None,
    keep_states: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, last state, states entering the chunks), the latter two empty unless asked for.

    Shapes as `selective_scan_op`, and `entering_shape`.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if native.leaves_to_reference("selective_scan", *tensors, gap):
        return reference.forward(*tensors, delta_softplus, return_last_state, gap, False, out_dtype)
    out = torch.empty(u.shape, dtype=torch.float32)
    state = torch.empty((*u.shape[:2], A.shape[1]) if return_last_state else 0, dtype=torch.float32)
    entering = torch.empty(entering_shape(u, A) if keep_states else 0, dtype=torch.float32)
    others = {"state": state if return_last_state else None, "entering": entering if keep_states else None}
    _Call(*tensors, delta_softplus, gap=gap, out=out, **others).run("selective_scan_forward")
    return out.to(out_dtype or u.dtype), state, entering


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    gap: Tensor | None = None,
    entering: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and gap in their dtypes, empty for what is None.

    The way forward is gone once more where it did not keep the states entering the chunks.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if native.leaves_to_reference("selective_scan", *tensors, gap):
        return reference.backward(grad_out, grad_state, *tensors, delta_softplus, gap)
    if entering is None or entering.dim() == 1:
        *_, entering = forward(*tensors, delta_softplus, False, gap, keep_states=True)
    call = _Call(*tensors, delta_softplus, gap=gap, grad_out=grad_out, grad_state=grad_state, entering=entering)
    tensors = (*tensors, gap)
    parts = call.parts()
    grads = []
    for name, x in zip(("u", "delta", "A", "B", "C", "D", "z", "bias", "gap"), tensors, strict=True):
        if x is None:
            grads.append(None)
            continue
        # What several tasks add to comes in parts with an axis of its own, summed here in one order.
        is_map = name in ("u", "delta", "z", "gap")
        leading = () if is_map else (parts,) if x.dim() == 4 else (u.shape[0],)
        grads.append(torch.empty((*leading, *x.shape), dtype=torch.float32))
        call.set(f"grad_{name}", grads[-1])
    call.run("selective_scan_backward")
    return tuple(
        u.new_empty(0) if x is None else (grad if grad.dim() == x.dim() else grad.sum(0)).to(x.dtype)
        for x, grad in zip(tensors, grads, strict=True)
    )


def load() -> dispatch.Implementation:
    """Compile, and return the functions of `selective_scan`."""
    _library()
    return dispatch.Implementation(forward, backward)
