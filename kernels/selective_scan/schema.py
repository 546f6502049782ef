"""The arguments of `visionmix::selective_scan`."""

from visionmix.kernels.schema import Schema

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"

SCHEMA = Schema(
    "selective_scan",
    f"({_INPUTS}, bool delta_softplus, bool return_last_state, Tensor? gap=None, bool keep_states=False, "
    'str implementation="auto", ScalarType? out_dtype=None) -> (Tensor out, Tensor state, Tensor entering)',
    f"(Tensor grad_out, Tensor? grad_state, {_INPUTS}, bool delta_softplus, Tensor? gap=None, Tensor? entering=None, "
    'str implementation="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
Arguments, Gradients = SCHEMA.Arguments, SCHEMA.Gradients
