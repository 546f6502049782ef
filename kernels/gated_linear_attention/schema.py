"""The arguments of `visionmix::gated_linear_attention` and `visionmix::bidirectional_gated_linear_attention`."""

from visionmix.kernels.schema import Schema

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state"

SCHEMA = Schema(
    "gated_linear_attention",
    f'({_INPUTS}, bool output_final_state, str implementation="auto") -> (Tensor out, Tensor state)',
    f'(Tensor grad_out, Tensor? grad_state, {_INPUTS}, str implementation="auto") -> '
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
Arguments, Gradients = SCHEMA.Arguments, SCHEMA.Gradients

_BOTH = "Tensor q, Tensor k, Tensor v, Tensor g_forward, Tensor g_backward, float scale, str merge"

BIDIRECTIONAL_SCHEMA = Schema(
    "bidirectional_gated_linear_attention",
    f'({_BOTH}, str implementation="auto", ScalarType? out_dtype=None) -> Tensor',
    f'(Tensor grad_out, {_BOTH}, str implementation="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
BidirectionalArguments, BidirectionalGradients = BIDIRECTIONAL_SCHEMA.Arguments, BIDIRECTIONAL_SCHEMA.Gradients
