"""The arguments of `visionmix::neighborhood_attention`."""

from torch import Tensor

from visionmix.kernels.schema import Schema

# A dilation may follow the size of the map, which is a symbol in graphs of all sizes.
_OPTIONS = (
    "int[] kernel_size, int[] stride, SymInt[] dilation, int[] is_causal, float scale, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? relative_position_bias, bool circular, Tensor? key_padding=None, "
    'Tensor? value_padding=None, str implementation="auto"'
)

SCHEMA = Schema(
    "neighborhood_attention",
    f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
Arguments, Gradients = SCHEMA.Arguments, SCHEMA.Gradients


def mixed_tensors(a: Arguments) -> tuple[Tensor | None, ...]:
    """Return the tensors that decide in which type is computed: all but the paddings, which follow key and value."""
    return a.query, a.key, a.value, a.additional_keys, a.additional_values, a.relative_position_bias
