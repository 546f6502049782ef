"""Registers both ops of gated linear attention: their fakes, FLOPs and implementations."""

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.gated_linear_attention import cpu, reference
from visionmix.kernels.gated_linear_attention.schema import (
    BIDIRECTIONAL_SCHEMA,
    SCHEMA,
    Arguments,
    BidirectionalArguments,
)
from visionmix.kernels.registration import register_op


def _fake(a: Arguments):
    batch, _, heads, dk = a.q.shape
    shape = (batch, heads, dk, a.v.shape[-1]) if a.output_final_state else (0,)
    dtype = dispatch.compute_dtype(*SCHEMA.input_tensors(a))
    return a.v.new_empty(a.v.shape), a.v.new_empty(shape, dtype=dtype)


def _flops(a: Arguments | BidirectionalArguments) -> int:
    """k^T v into the state and q into the output, 2 dk dv each per token and head, plus the decay of the state, dk
    dv."""
    batch, length, heads, dk = a.q
    return 5 * batch * length * heads * dk * a.v[-1]


def _backward_flops(a: Arguments | BidirectionalArguments, gradients: tuple) -> int:
    """States again (3 dk dv), their gradients (3), and the products for the gradients of q, k, v and g (2 each)."""
    batch, length, heads, dk = a.q
    return 14 * batch * length * heads * dk * a.v[-1]


register_op(
    SCHEMA, fake=_fake, flops=_flops, backward_flops=_backward_flops, reference=dispatch.reference_loader(reference)
)


def _fake_bidirectional(a: BidirectionalArguments):
    return a.v.new_empty(a.v.shape, dtype=a.out_dtype)


_FUNCTIONS = ("bidirectional_forward", "bidirectional_backward")
_NAME = "gated_linear_attention"
_BIDIRECTIONAL = f"bidirectional_{_NAME}"

register_op(
    BIDIRECTIONAL_SCHEMA,
    fake=_fake_bidirectional,
    flops=lambda a: 2 * _flops(a),
    backward_flops=lambda a, gradients: 2 * _backward_flops(a, gradients),
    reference=dispatch.reference_loader(reference, *_FUNCTIONS),
)

dispatch.register(_NAME, "cpu", cpu.load)
dispatch.register(_NAME, "triton", gpu.loader(_NAME, _NAME))
dispatch.register(_BIDIRECTIONAL, "cpu", cpu.load_bidirectional)
dispatch.register(_BIDIRECTIONAL, "triton", gpu.loader(_BIDIRECTIONAL, _NAME, *_FUNCTIONS))
