"""Registers `visionmix::selective_scan`: its fake, FLOPs and implementations."""

import torch

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.registration import register_op
from visionmix.kernels.selective_scan import chunks, cpu, reference
from visionmix.kernels.selective_scan.schema import SCHEMA, Arguments, Gradients


def _fake(a: Arguments):
    dtype = dispatch.compute_dtype(*SCHEMA.input_tensors(a))
    state = a.u.new_empty((*a.u.shape[:2], a.A.shape[1]) if a.return_last_state else (0,), dtype=dtype)
    shapes = {"cpu": cpu.entering_shape} | ({"triton": chunks.entering_shape} if a.gap is None else {})
    shape = shapes.get(dispatch.resolve("selective_scan", a.implementation, a.u.device))
    kept = a.keep_states and shape is not None and dtype == torch.float32
    entering = a.u.new_empty(shape(a.u, a.A) if kept else (0,), dtype=dtype)
    return a.u.new_empty(a.u.shape, dtype=a.out_dtype), state, entering


def _flops(a: Arguments) -> int:
    """7 per token, channel and state (delta A, exp, decay h, delta u B, their sum, C h and its sum); 1 per token and
    channel for delta u, 2 more with D, 3 more with z."""
    batch, dim, length = a.u
    return batch * dim * length * (7 * a.A[1] + 1 + 2 * (a.D is not None) + 3 * (a.z is not None))


def _backward_flops(a: Arguments, gradients: Gradients) -> int:
    """The states again (5), and their gradients: 2 for C dy, 1 for the decay, 2 each for the gradients of x = delta u,
    B and C, 1 + 2 + 2 for those of the decay rate, delta and A; per token and channel 4 for u and delta, 4 more with D,
    7 with z."""
    batch, dim, length = a.u
    return batch * dim * length * (19 * a.A[1] + 4 + 4 * (a.D is not None) + 7 * (a.z is not None))


register_op(
    SCHEMA, fake=_fake, flops=_flops, backward_flops=_backward_flops, reference=dispatch.reference_loader(reference)
)
dispatch.register("selective_scan", "cpu", cpu.load)
dispatch.register("selective_scan", "triton", gpu.loader("selective_scan", "selective_scan"))
