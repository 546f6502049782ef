"""`visionmix::neighborhood_attention`, as mixers call it: one op for 1-D, 2-D and 3-D maps.

The function here checks nothing: it scripts, traces and exports. The checked functions stand in the package.
"""

import math

import torch
from torch import Tensor

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.exported import is_symbolic
from visionmix.kernels.neighborhood_attention import exported, padding, reference
from visionmix.kernels.neighborhood_attention.windows import count_pairs
from visionmix.kernels.registration import register_op


def _reference_forward(query: Tensor, key: Tensor, value: Tensor, *args) -> tuple[Tensor, Tensor]:
    if is_symbolic(*query.shape[1:-2]):
        dtype = dispatch.compute_dtype(query, key, value, *args[5:8])
        return exported.forward(query, key, value, *args, dtype)
    return padding.forward(reference.forward, query, key, value, *args)


def neighborhood_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[int],
    scale: float,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    relative_position_bias: Tensor | None,
    circular: bool,
    key_padding: Tensor | None = None,
    value_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of neighborhood attention; the lists have one entry an axis of the map.

    `is_causal` holds 0 or 1: PyTorch cannot trace a list of bools.

    A map smaller than ``kernel_size * dilation``, unless the window is circular, is treated as if it went on to that
    size at the end of each axis, with keys `key_padding` (key heads, dim) and values `value_padding`
    (key heads, value dim), or zeros: its queries see these tokens, which have no output of their own.
    """
    if not torch.jit.is_scripting():
        if dispatch.bypassed():
            return dispatch.call_reference(
                _reference_forward,
                query,
                key,
                value,
                kernel_size,
                stride,
                dilation,
                is_causal,
                scale,
                additional_keys,
                additional_values,
                relative_position_bias,
                circular,
                key_padding,
                value_padding,
            )
    return torch.ops.visionmix.neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        relative_position_bias,
        circular,
        key_padding,
        value_padding,
    )


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(query, key, value, *args):
    # kernel_size, stride, dilation, is_causal, scale, then the optional tensors.
    dtype = dispatch.compute_dtype(query, key, value, *args[5:8])
    shape = query.shape[:-1]
    return value.new_empty((*shape, value.shape[-1])), query.new_empty(shape, dtype=dtype)


def _fake_backward(grad_out, grad_lse, query, key, value, out, lse, *args):
    options, paddings = padding.split_options(args)
    options = (query.new_empty(0) if x is None else _like(x) for x in (*options[5:8], *paddings))
    return _like(query), _like(key), _like(value), *options


def _setup_context(ctx, inputs, output):
    query, key, value, *ctx.window, additional_keys, additional_values, bias, ctx.circular = inputs[:12]
    *paddings, implementation = inputs[12:]
    ctx.implementation = dispatch.resolve("neighborhood_attention", implementation, query.device)
    ctx.save_for_backward(query, key, value, *output, additional_keys, additional_values, bias, *paddings)


def _backward(ctx, grad_out, grad_lse):
    *tensors, additional_keys, additional_values, bias, key_padding, value_padding = ctx.saved_tensors
    options, paddings = (additional_keys, additional_values, bias), (key_padding, value_padding)
    grads = torch.ops.visionmix.neighborhood_attention_backward(
        grad_out, grad_lse, *tensors, *ctx.window, *options, ctx.circular, *paddings, ctx.implementation
    )
    from_options = [None if x is None else grad for x, grad in zip((*options, *paddings), grads[3:], strict=True)]
    # kernel_size, stride, dilation, is_causal and scale stand between the tensors and the options.
    none = (None,) * 5
    return *grads[:3], *none, *from_options[:3], None, *from_options[3:], None


def _pairs(query_shape, window, additional_shape, circular) -> int:
    """Return the (query, key) pairs of all images and heads, those of padded queries too: they are computed."""
    batch, *grid, heads, _ = query_shape
    kernel_size, stride, dilation, is_causal = (tuple(option) for option in window[:4])
    grid = padding.extended_grid(grid, kernel_size, dilation, circular)
    extra = 0 if additional_shape is None else additional_shape[1] * math.prod(grid)
    return batch * heads * (count_pairs(grid, kernel_size, stride, dilation, is_causal, circular) + extra)


def _flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """A product with a key and one with a value, 2 dk + 2 dv, for each pair of a query and a key it sees."""
    return 2 * (query_shape[-1] + value_shape[-1]) * _pairs(query_shape, args[:5], args[5], args[8])


def _backward_flops(
    grad_shape, grad_lse_shape, query_shape, key_shape, value_shape, out, lse, *args, out_shape=None, **kwargs
) -> int:
    """Scores again and the gradients of query and key (2 dk each), of the weights and the value (2 dv each)."""
    return (6 * query_shape[-1] + 4 * value_shape[-1]) * _pairs(query_shape, args[:5], args[5], args[8])


@padding.padded
def _load_reference() -> dispatch.Implementation:
    return dispatch.Implementation(reference.forward, reference.backward)


_OPTIONS = (
    "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? relative_position_bias, bool circular, Tensor? key_padding=None, "
    'Tensor? value_padding=None, str implementation="auto"'
)

register_op(
    "neighborhood_attention",
    schema=f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    backward_schema=(
        "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    fake=_fake,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    reference=_load_reference,
)


@padding.padded
def _load_cpu() -> dispatch.Implementation:
    from visionmix.kernels.neighborhood_attention import cpu

    return cpu.load()


dispatch.register("neighborhood_attention", "cpu", _load_cpu)
dispatch.register(
    "neighborhood_attention",
    "triton",
    padding.padded(gpu.loader("neighborhood_attention", "neighborhood_attention")),
)
