"""The arguments of `visionmix::selective_scan_2d`."""

from visionmix.kernels.schema import Schema

_INPUTS = (
    "Tensor x, Tensor delta, Tensor? delta_weight, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, str orders, str merge, str permute"
)

SCHEMA = Schema(
    "selective_scan_2d",
    f'({_INPUTS}, bool keep_states=False, str implementation="auto", ScalarType? out_dtype=None, '
    "Tensor? cells=None, Tensor? gaps=None) -> (Tensor out, Tensor entering)",
    f'(Tensor grad_out, {_INPUTS}, Tensor? entering=None, str implementation="auto", Tensor? cells=None, '
    "Tensor? gaps=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    indices=("cells", "gaps"),
)
Arguments, Gradients = SCHEMA.Arguments, SCHEMA.Gradients
