"""Neighborhood attention on sequences, maps and volumes.

`na1d`, `na2d` and `na3d` check what they are given. Mixers call `neighborhood_attention_op`, which checks nothing: it
scripts, traces and exports.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_flags, check_scale, check_shape, check_tensors
from visionmix.kernels.neighborhood_attention import op as _registered  # noqa: F401
from visionmix.kernels.neighborhood_attention.arguments import AXES, check_heads, checked_window
from visionmix.kernels.neighborhood_attention.halves import na2d_av, na2d_qk, reference_forward
from visionmix.kernels.neighborhood_attention.schema import Arguments

__all__ = ["na1d", "na2d", "na2d_av", "na2d_qk", "na3d", "neighborhood_attention_op"]


def neighborhood_attention_op(
    query: Tensor, key: Tensor, value: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[int], scale: float,
    additional_keys: Tensor | None, additional_values: Tensor | None, relative_position_bias: Tensor | None,
    circular: bool, key_padding: Tensor | None = None, value_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (output, log-sum-exp) of neighborhood attention; the lists have one entry per axis of the map.

    `is_causal` holds 0 or 1: PyTorch cannot trace a list of bools.

    A map smaller than ``kernel_size * dilation``, unless the window is circular, is extended to that size at the end of
    each axis, with keys `key_padding` (key heads, dim) and values `value_padding` (key heads, value dim), or zeros: its
    queries see these tokens, which have no output of their own.
    """
    if not torch.jit.is_scripting():
        if dispatch.bypassed():
            window = (kernel_size, stride, dilation, is_causal, scale)
            options = (additional_keys, additional_values, relative_position_bias, circular, key_padding, value_padding)
            return dispatch.call_reference(reference_forward, Arguments(query, key, value, *window, *options))
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


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _neighborhood_attention(
    axes: int,
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1, is_causal: bool | Sequence[bool] = False,
    scale: float | None = None, additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
    relative_position_bias: Tensor | None = None, circular: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Check the arguments of `na1d`, `na2d` or `na3d`, and call the op."""
    check_scale(scale)
    check_flags(circular=circular, return_lse=return_lse)
    tensors = {"query": query, "key": key, "value": value}
    extra = {"additional_keys": additional_keys, "additional_values": additional_values}
    bias = {"relative_position_bias": relative_position_bias}
    ranks = dict.fromkeys(tensors, (axes + 3,)) | dict.fromkeys(extra, (4,)) | dict.fromkeys(bias, (axes + 1,))
    check_tensors(tensors | extra | bias, ranks, tensors)
    batch, *grid, heads, dim = query.shape
    key_heads, value_dim = value.shape[-2:]
    if dim == 0 or 0 in grid:
        raise ValueError(f"query has shape {tuple(query.shape)}; the map and the head dimension must be at least 1")
    shape = {"batch": batch, **dict(zip(AXES[axes], grid, strict=True))}
    check_shape("key", key, shape | {"heads": key_heads, "dim": dim})
    check_shape("value", value, shape | {"heads": key_heads, "value dim": value_dim})
    check_heads("query", heads, "key and value", key_heads)
    if (additional_keys is None) != (additional_values is None):
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{missing} is None; additional_keys and additional_values must be given together")
    if additional_keys is not None and additional_values is not None:
        shape = {"batch": batch, "extra": additional_keys.shape[1], "heads": key_heads}
        check_shape("additional_keys", additional_keys, shape | {"dim": dim})
        check_shape("additional_values", additional_values, shape | {"value dim": value_dim})
    window = checked_window(grid, kernel_size, stride, dilation, is_causal, circular)
    spans = {f"2 x {k} - 1 {axis}": 2 * k - 1 for axis, k in zip(AXES[axes], window.kernel_size, strict=True)}
    check_shape("relative_position_bias", relative_position_bias, {"heads": heads} | spans)
    scale = dim**-0.5 if scale is None else scale
    options = (scale, additional_keys, additional_values, relative_position_bias, circular)
    out, lse = neighborhood_attention_op(query, key, value, *window[:4], *options)
    return (out, lse) if return_lse else out


def _on_axes(axes: int, attention: Callable[Concatenate[int, _P], _R], doc: str) -> Callable[_P, _R]:
    """Return `attention` with `axes` set, under the name na1d, na2d or na3d and the docstring `doc`."""

    def on_axes(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return attention(axes, *args, **kwargs)

    signature = inspect.signature(attention)
    vars(on_axes)["__signature__"] = signature.replace(parameters=[*signature.parameters.values()][1:])
    on_axes.__name__ = on_axes.__qualname__ = f"na{axes}d"
    on_axes.__doc__ = doc
    return on_axes


na2d = _on_axes(
    2,
    _neighborhood_attention,
    """Neighborhood attention on a map: every query attends to the window of keys around it.

`out_i = sum_j softmax_j(scale q_i . k_j + bias[j - i]) v_j`, j over the window of i. The arguments are those of
NATTEN 0.21, in its order; its older position bias and a circular window follow them. Along each axis, on its own:

- Tokens whose positions agree modulo `dilation` form a class of n tokens; queries see keys of their own class. In
  what follows, positions count inside it.
- The window of query i holds `kernel_size` = k keys: it starts at `clamp(i - k // 2, 0, n - k)`, so that near a
  border it is shifted inside rather than cut.
- Queries `[g s, g s + s)` of a `stride` s share the window of their leader `min(g s + s // 2, n - 1)`; s = k is
  blocked attention.
- On a causal axis the leader is `min(g s + s - 1, n - 1)`, and query i sees keys `max(leader - k + 1, 0)` to i:
  this window is cut, not shifted.

A circular window is CLEAR's, of radius r = (k + 1) / 2, so k = 2 r - 1 for the published r = 8, 16, 32: query i
sees the keys j with `sum_axes ((j - i) / r)^2 < 1`, counted in steps of the dilation; for one k on all axes those
strictly nearer than r. It is centred on its query and cut at the border of the map, so any kernel size fits; k must
be odd and the stride 1; causal axes keep the keys up to i.

A NaN in a key reaches the outputs of the queries that see it and no others. One in a value, or an infinity there,
may reach queries nearby that do not see it, since their weight 0 times NaN is NaN: on the compiled path next to
windows that are shifted, cut or circular, elsewhere within a tile of queries. Gradients spread either in that way.

Hassani et al., 2022, Neighborhood Attention Transformer (arXiv 2204.07143); Hassani and Shi, 2022, Dilated
Neighborhood Attention Transformer (arXiv 2209.15001); Hassani et al., 2025, Generalized Neighborhood Attention
(arXiv 2504.16922), for the stride; Liu et al., 2024, CLEAR (arXiv 2412.16112), for the circular window.

Args:
    query: (batch, height, width, heads, dim), of any floating-point dtype, as the others.
    key: (batch, height, width, key heads, dim); the key heads divide the heads, and consecutive query heads share
        one.
    value: (batch, height, width, key heads, value dim).
    kernel_size: keys a window and axis, one number or (height, width).
    stride: queries that share a window, at most the kernel size.
    dilation: distance of neighbouring keys; kernel_size x dilation is at most the map's size.
    is_causal: whether keys after the query are hidden, for both axes or each.
    scale: factor of the products; dim^-0.5 if None.
    additional_keys: (batch, extra, key heads, dim): keys that every query attends to besides its window.
    additional_values: (batch, extra, key heads, value dim).
    relative_position_bias: (heads, 2 k - 1, 2 k - 1), added to the products after scaling; the entry for
        (key - query) / dilation + k - 1 on each axis. Additional keys have none.
    circular: whether the window is a disc.
    return_lse: whether to return the log-sum-exp of the scores too.

Returns:
    The output (batch, height, width, heads, value dim) in value's dtype; with `return_lse` also the log-sum-exp
    (batch, height, width, heads), float32, or float64 if any input is. So is the computation.

Raises:
    TypeError: a tensor argument is not a real floating-point tensor, or an option of another kind.
    ValueError: shapes or devices do not fit together, the window does not fit the map, or `scale` is not finite.
""",
)

na1d = _on_axes(
    1,
    _neighborhood_attention,
    """Neighborhood attention on a sequence: `na2d` along one axis.

Formula, arguments and errors are those of `na2d`, with one axis in place of two:

Args:
    query: (batch, length, heads, dim).
    key: (batch, length, key heads, dim).
    value: (batch, length, key heads, value dim).
    kernel_size: keys a window.
    relative_position_bias: (heads, 2 k - 1).
    circular: whether the window is centred and cut at the ends, as `na2d`'s disc.

Returns:
    The output (batch, length, heads, value dim); with `return_lse` also the log-sum-exp (batch, length, heads).
""",
)

na3d = _on_axes(
    3,
    _neighborhood_attention,
    """Neighborhood attention on a volume: `na2d` along three axes.

Formula, arguments and errors are those of `na2d`, with three axes in place of two:

Args:
    query: (batch, depth, height, width, heads, dim).
    key: (batch, depth, height, width, key heads, dim).
    value: (batch, depth, height, width, key heads, value dim).
    kernel_size: keys a window and axis, one number or (depth, height, width).
    relative_position_bias: (heads, 2 k - 1, 2 k - 1, 2 k - 1).
    circular: whether the window is a ball.

Returns:
    The output (batch, depth, height, width, heads, value dim); with `return_lse` also the log-sum-exp
    (batch, depth, height, width, heads).
""",
)
