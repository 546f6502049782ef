"""Registers `visionmix::selective_scan_2d`: its fake, FLOPs and implementations."""

import torch

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.registration import register_op
from visionmix.kernels.selective_scan_2d import chunks, cpu, reference
from visionmix.kernels.selective_scan_2d.routes import steps_of
from visionmix.kernels.selective_scan_2d.schema import SCHEMA, Arguments, Gradients
from visionmix.scans.order_names import count_routes


def _fake(a: Arguments):
    x = a.x
    count = count_routes(a.orders) if a.cells is None else a.A.shape[0]
    shape = (*x.shape[:3], count, x.shape[3]) if a.merge == "none" else x.shape
    dtype = dispatch.compute_dtype(*SCHEMA.input_tensors(a))
    shapes = {"cpu": cpu.entering_shape, "triton": chunks.entering_shape}
    entering = shapes.get(dispatch.resolve("selective_scan_2d", a.implementation, x.device))
    kept = (0,)
    if a.keep_states and entering is not None and dtype == torch.float32:
        kept = entering(x, a.A, steps_of(a))
    return x.new_empty(shape, dtype=a.out_dtype), x.new_empty(kept, dtype=dtype)


def _scans(a: Arguments) -> int:
    """Return the tokens and channels of all orders, each with one step per cell unless their steps are given."""
    batch, height, width, channels = a.x
    return batch * (height * width if a.cells is None else a.cells[2]) * channels * a.A[0]


def _flops(a: Arguments) -> int:
    """As `selective_scan`, for each order, and per token and channel 2 rank more for a low-rank delta, 1 to merge, 2
    for gaps."""
    rank = 0 if a.delta_weight is None else a.delta_weight[-1]
    return _scans(a) * (7 * a.A[2] + 2 + 2 * (a.D is not None) + 2 * rank + 2 * (a.gaps is not None))


def _backward_flops(a: Arguments, gradients: Gradients) -> int:
    """As `selective_scan`, for each order, and per token and channel 6 rank more for a low-rank delta, 1 to add up
    dx, 4 for gaps."""
    rank = 0 if a.delta_weight is None else a.delta_weight[-1]
    return _scans(a) * (19 * a.A[2] + 5 + 4 * (a.D is not None) + 6 * rank + 4 * (a.gaps is not None))


register_op(
    SCHEMA, fake=_fake, flops=_flops, backward_flops=_backward_flops, reference=dispatch.reference_loader(reference)
)
dispatch.register("selective_scan_2d", "cpu", cpu.load)
dispatch.register("selective_scan_2d", "triton", gpu.loader("selective_scan_2d", "selective_scan_2d"))
