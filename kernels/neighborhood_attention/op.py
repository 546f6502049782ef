"""Registers `visionmix::neighborhood_attention`, one op for 1-D, 2-D and 3-D maps: its fake, FLOPs, implementations."""

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.neighborhood_attention import padding, reference
from visionmix.kernels.neighborhood_attention.schema import SCHEMA, Arguments, Gradients, mixed_tensors
from visionmix.kernels.neighborhood_attention.tables import window_of
from visionmix.kernels.registration import register_op

_NAME = "neighborhood_attention"


def _fake(a: Arguments):
    shape = a.query.shape[:-1]
    lse = a.query.new_empty(shape, dtype=dispatch.compute_dtype(*mixed_tensors(a)))
    return a.value.new_empty((*shape, a.value.shape[-1])), lse


def _pairs(a: Arguments) -> int:
    return padding.pairs(a.query, window_of(a), a.additional_keys)


def _flops(a: Arguments) -> int:
    """A product with a key and one with a value, 2 dk + 2 dv, for each pair of a query and a key it sees."""
    return 2 * (a.query[-1] + a.value[-1]) * _pairs(a)


def _backward_flops(a: Arguments, gradients: Gradients) -> int:
    """Scores again and the gradients of query and key (2 dk each), of the weights and the value (2 dv each)."""
    return (6 * a.query[-1] + 4 * a.value[-1]) * _pairs(a)


@padding.padded
def _load_cpu() -> dispatch.Implementation:
    from visionmix.kernels.neighborhood_attention import cpu

    return cpu.load()


register_op(
    SCHEMA,
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    reference=padding.padded(dispatch.reference_loader(reference)),
)
dispatch.register(_NAME, "cpu", _load_cpu)
dispatch.register(_NAME, "triton", padding.padded(gpu.loader(_NAME, _NAME)))
