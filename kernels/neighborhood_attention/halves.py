"""The two halves of neighborhood attention, before and after the softmax, as two ops of the cheap kind, in PyTorch.

`na2d_qk` and `na2d_av` check what they are given. Mixers call `neighborhood_scores_op` and `neighborhood_sums_op`,
which check nothing: they script, trace and export.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_flags, check_scale, check_shape, check_tensors
from visionmix.kernels.exported import is_exported
from visionmix.kernels.neighborhood_attention import exported, gathered, reference, tiles
from visionmix.kernels.neighborhood_attention import padding as padded_maps
from visionmix.kernels.neighborhood_attention.arguments import AXES, check_heads, checked_window
from visionmix.kernels.neighborhood_attention.schema import Arguments
from visionmix.kernels.neighborhood_attention.tables import Tables, Window
from visionmix.kernels.registration import register_reference_op


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    relative_position_bias: Tensor | None = None,
    circular: bool = False,
) -> Tensor:
    """Return the scores of neighborhood attention on a map: `na2d` up to its softmax.

    `s_ij = scale q_i . k_j + bias[j - i]`, j over the window of i, so that

        na2d(q, k, v, ...) = na2d_av(na2d_qk(q, k, ...).softmax(-1), v, ...)

    with the weights in between to read, mask or change. Windows, arguments and sources are those of `na2d`; the
    function is that of NATTEN up to 0.17, but for heads that stand last and a `scale` that is not left to the caller.

    A NaN in a key may reach the gradients of queries nearby that do not see it.

    Args:
        query: (batch, height, width, heads, dim), of any floating-point dtype, as the others.
        key: (batch, height, width, key heads, dim); the key heads divide the heads, and consecutive query heads share
            one.
        kernel_size: keys a window and axis, one number or (height, width).
        stride: queries that share a window, at most the kernel size.
        dilation: distance of neighbouring keys; kernel_size x dilation is at most the map's size.
        is_causal: whether keys after the query are hidden, for both axes or each.
        scale: factor of the products; dim^-0.5 if None.
        additional_keys: (batch, extra, key heads, dim): keys that every query attends to besides its window.
        relative_position_bias: (heads, 2 k - 1, 2 k - 1), added to the products after scaling; the entry for
            (key - query) / dilation + k - 1 on each axis. Additional keys have none.
        circular: whether the window is a disc, cut at the border of the map. That of kernel size 3 is the whole 3x3.

    Returns:
        The scores (batch, height, width, heads, kernel_size^2 + extra), row by row of the window, then the additional
        keys; -inf where a window that is causal or circular holds no key. Scores and their computation are float32, or
        float64 if any input is.

    Raises:
        TypeError: a tensor argument is not a real floating-point tensor, or an option of another kind.
        ValueError: shapes or devices do not fit together, the window does not fit the map, or `scale` is not finite.
    """
    check_scale(scale)
    check_flags(circular=circular)
    tensors = {"query": query, "key": key}
    options = {"additional_keys": additional_keys, "relative_position_bias": relative_position_bias}
    ranks = {"query": (5,), "key": (5,), "additional_keys": (4,), "relative_position_bias": (3,)}
    check_tensors(tensors | options, ranks, tensors)
    batch, *grid, heads, dim = query.shape
    if dim == 0 or 0 in grid:
        raise ValueError(f"query has shape {tuple(query.shape)}; the map and the head dimension must be at least 1")
    key_heads = key.shape[3]
    shape = {"batch": batch, **dict(zip(AXES[2], grid, strict=True))}
    check_shape("key", key, shape | {"heads": key_heads, "dim": dim})
    check_heads("query", heads, "key", key_heads)
    if additional_keys is not None:
        extra = {"batch": batch, "extra": additional_keys.shape[1], "heads": key_heads, "dim": dim}
        check_shape("additional_keys", additional_keys, extra)
    window = checked_window(grid, kernel_size, stride, dilation, is_causal, circular)
    spans = {f"2 x {k} - 1 {axis}": 2 * k - 1 for axis, k in zip(AXES[2], window.kernel_size, strict=True)}
    check_shape("relative_position_bias", relative_position_bias, {"heads": heads} | spans)
    scale = dim**-0.5 if scale is None else scale
    return neighborhood_scores_op(query, key, window.flat(), scale, additional_keys, relative_position_bias)


def na2d_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    additional_values: Tensor | None = None,
    circular: bool = False,
) -> Tensor:
    """Return the sums of values that neighborhood attention ends with: `na2d` from its softmax on.

    `out_i = sum_j w_ij v_j`, j over the window of i, for any weights w: nothing asks that they sum to 1. Windows,
    arguments and sources are those of `na2d`; `na2d_qk` returns scores in the order of these weights.

    A NaN in a value may reach the outputs of queries nearby that do not see it, since 0 times NaN is NaN.

    Args:
        weights: (batch, height, width, heads, kernel_size^2 + extra), of any floating-point dtype, as the others; row
            by row of the window, then the additional values. Those of places that hold no key, where `na2d_qk` gives
            -inf, are not read.
        value: (batch, height, width, key heads, dim); the key heads divide the heads.
        kernel_size: keys a window and axis, one number or (height, width).
        stride: queries that share a window, at most the kernel size.
        dilation: distance of neighbouring keys; kernel_size x dilation is at most the map's size.
        is_causal: whether keys after the query are hidden, for both axes or each.
        additional_values: (batch, extra, key heads, dim).
        circular: whether the window is a disc.

    Returns:
        The output (batch, height, width, heads, dim) in value's dtype. It is computed in float32, or in float64 if any
        input is.

    Raises:
        TypeError: a tensor argument is not a real floating-point tensor, or an option of another kind.
        ValueError: shapes or devices do not fit together, or the window does not fit the map.
    """
    check_flags(circular=circular)
    tensors = {"weights": weights, "value": value}
    ranks = {"weights": (5,), "value": (5,), "additional_values": (4,)}
    check_tensors(tensors | {"additional_values": additional_values}, ranks, tensors)
    batch, *grid, key_heads, dim = value.shape
    if dim == 0 or 0 in grid:
        raise ValueError(f"value has shape {tuple(value.shape)}; the map and the head dimension must be at least 1")
    heads = weights.shape[3]
    check_heads("weights", heads, "value", key_heads)
    extra = 0
    if additional_values is not None:
        extra = additional_values.shape[1]
        shape = {"batch": batch, "extra": extra, "heads": key_heads, "dim": dim}
        check_shape("additional_values", additional_values, shape)
    window = checked_window(grid, kernel_size, stride, dilation, is_causal, circular)
    shape = {"batch": batch, **dict(zip(AXES[2], grid, strict=True)), "heads": heads}
    check_shape("weights", weights, shape | {"window": math.prod(window.kernel_size) + extra})
    return neighborhood_sums_op(weights, value, window.flat(), additional_values)


def neighborhood_scores_op(
    query: Tensor,
    key: Tensor,
    window: list[int],
    scale: float,
    additional_keys: Tensor | None,
    relative_position_bias: Tensor | None,
) -> Tensor:
    """Return what `na2d_qk` does, without its checks, for a window as `Window.flat` writes it; a map that is smaller
    than the window is extended by keys of zeros."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            arguments = (query, key, window, scale, additional_keys, relative_position_bias)
            return dispatch.call_reference(_reference_scores, arguments)
    return torch.ops.visionmix.neighborhood_scores(query, key, window, scale, additional_keys, relative_position_bias)


def neighborhood_sums_op(weights: Tensor, value: Tensor, window: list[int], additional_values: Tensor | None) -> Tensor:
    """Return what `na2d_av` does, without its checks, for a window as `Window.flat` writes it; a map that is smaller
    than the window is extended by values of zeros."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference_sums, (weights, value, window, additional_values))
    return torch.ops.visionmix.neighborhood_sums(weights, value, window, additional_values)


def reference_forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of neighborhood attention by the PyTorch reference."""
    if is_exported():
        return exported.forward(a)
    return padded_maps.forward(reference.forward, a)


def _implementation(grid: Sequence[int]):
    """Return the module that computes products and sums: a graph for all sizes cannot be cut into tiles, be it exported
    or the backward pass of a compiled one."""
    return gathered if any(isinstance(size, torch.SymInt) for size in grid) else tiles


def _scores(
    query: Tensor,
    key: Tensor,
    tables: Tables,
    scale: float,
    additional_keys: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    query = query * scale
    scores = _implementation(query.shape[1:-2]).products(query, key, tables)
    scores = tables.biased(scores, bias)
    if additional_keys is None:
        return scores
    extra = additional_keys.to(key.dtype).transpose(1, 2)  # (batch, key heads, extra, dim)
    queries = query.flatten(1, -3).unflatten(2, (key.shape[-2], -1)).transpose(1, 2)
    products = (queries.flatten(2, 3) @ extra.transpose(2, 3)).unflatten(2, queries.shape[2:4]).transpose(1, 2)
    return torch.cat([scores, products.flatten(2, 3).unflatten(1, query.shape[1:-2])], -1)


def _sums(weights: Tensor, value: Tensor, tables: Tables, additional_values: Tensor | None) -> Tensor:
    grid, window = weights.shape[1:-2], tables.hidden().shape[-1]
    near = weights[..., :window].masked_fill(tables.hidden(), 0)
    out = _implementation(grid).sums(near, value, tables)
    if additional_values is None:
        return out
    extra = additional_values.to(value.dtype).transpose(1, 2)
    far = weights[..., window:].flatten(1, -3).unflatten(2, (value.shape[-2], -1)).transpose(1, 2)
    sums = (far.flatten(2, 3) @ extra).unflatten(2, far.shape[2:4]).transpose(1, 2)
    return out + sums.flatten(2, 3).unflatten(1, grid)


def _forward_scores(
    query: Tensor, key: Tensor, window: list[int], scale: float, keys: Tensor | None, bias: Tensor | None
) -> Tensor:
    dtype = dispatch.compute_dtype(query, key, keys, bias)
    tables = Tables(query.shape[1:-2], Window.of(window), query.device)
    return _scores(query.to(dtype), key.to(dtype), tables, scale, keys, bias).contiguous()


def _forward_sums(weights: Tensor, value: Tensor, window: list[int], values: Tensor | None) -> Tensor:
    dtype = dispatch.compute_dtype(weights, value, values)
    tables = Tables(value.shape[1:-2], Window.of(window), value.device)
    return _sums(weights.to(dtype), value.to(dtype), tables, values).to(value.dtype).contiguous()


def _reference_scores(arguments: tuple) -> Tensor:
    return _forward_scores(*arguments)


def _reference_sums(arguments: tuple) -> Tensor:
    return _forward_sums(*arguments)


def _fake_scores(query, key, window, scale, keys, bias) -> Tensor:
    keys_seen = math.prod(Window.of(window).kernel_size) + (0 if keys is None else keys.shape[1])
    return query.new_empty((*query.shape[:-1], keys_seen), dtype=dispatch.compute_dtype(query, key, keys, bias))


def _fake_sums(weights, value, *_) -> Tensor:
    return value.new_empty((*weights.shape[:-1], value.shape[-1]))


def _flops_scores(query, key, window, scale, keys, bias) -> int:
    return 2 * query[-1] * padded_maps.pairs(query, Window.of(window), keys)


def _flops_sums(weights, value, window, values) -> int:
    return 2 * value[-1] * padded_maps.pairs(weights, Window.of(window), values)


_SCORES = (
    "(Tensor query, Tensor key, int[] window, float scale, Tensor? additional_keys, Tensor? relative_position_bias) "
    "-> Tensor"
)
_SUMS = "(Tensor weights, Tensor value, int[] window, Tensor? additional_values) -> Tensor"
register_reference_op("neighborhood_scores", _SCORES, _forward_scores, _flops_scores, _fake_scores)
register_reference_op("neighborhood_sums", _SUMS, _forward_sums, _flops_sums, _fake_sums)
