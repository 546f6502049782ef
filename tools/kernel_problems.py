"""The shapes that the Triton kernels are compiled for ahead of time: those of published models, and odd ones."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call of an op, forward and backward, on meta tensors: `run(dtype)` makes its launches."""

    name: str
    run: Callable[[torch.dtype], None]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _triton(op: str):
    return importlib.import_module(f"visionmix.kernels.{op}.triton")


def gated_linear_attention(
    length: int, heads: int, dk: int, dv: int, *, batch: int = 1, bidirectional: bool = False, state: bool = False
) -> Callable[[torch.dtype], None]:
    """Return the run of `gated_linear_attention`, or the bidirectional form."""

    def run(dtype: torch.dtype) -> None:
        op = _triton("gated_linear_attention")
        q, k, g, g_backward = (_empty(batch, length, heads, dk, dtype=dtype) for _ in range(4))
        v, grad_out = (_empty(batch, length, heads, dv, dtype=dtype) for _ in range(2))
        if bidirectional:
            op.bidirectional_forward(q, k, v, g, g_backward, 1.0, "mean")
            op.bidirectional_backward(grad_out, q, k, v, g, g_backward, 1.0, "mean")
            return
        first, grad_last = (_empty(batch, heads, dk, dv) if state else None for _ in range(2))
        op.forward(q, k, v, g, 1.0, first, state)
        op.backward(grad_out, grad_last, q, k, v, g, 1.0, first)

    return run


PROBLEMS = {
    "gated_linear_attention": [
        Problem("vig_s 14x14", gated_linear_attention(196, 6, 32, 64, bidirectional=True)),
        Problem("vig_s 7x7", gated_linear_attention(49, 6, 32, 64, bidirectional=True)),
        Problem("one direction 14x14", gated_linear_attention(196, 6, 32, 64)),
        Problem("one direction 14x14, states", gated_linear_attention(196, 6, 32, 64, state=True)),
        Problem("dk 16, dv 32", gated_linear_attention(196, 3, 16, 32, bidirectional=True)),
        Problem("dk 64, dv 128", gated_linear_attention(196, 3, 64, 128, bidirectional=True)),
        Problem("dk 128, dv 256", gated_linear_attention(4096, 4, 128, 256, state=True)),
        Problem("4x4", gated_linear_attention(16, 6, 32, 64, bidirectional=True)),
        Problem("5x6", gated_linear_attention(30, 6, 32, 64, bidirectional=True)),
        Problem("dk 24, dv 40, states", gated_linear_attention(100, 3, 24, 40, state=True)),
    ],
}
