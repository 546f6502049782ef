"""A weighted sum of depthwise 3x3 filters of several dilations: how Spatial-Mamba joins the states of neighbours.

An op of the cheap kind, so that autocast does not round the states, which are float32 up to their norm.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.registration import register_reference_op


def dilated_filters_op(x: Tensor, filters: Tensor, dilations: list[int]) -> Tensor:
    """Return the sum of depthwise cross-correlations of x with 3x3 filters of several dilations.

    Cells beyond the border are those at it. Nothing is checked.

    Args:
        x: maps (batch, height, width, channels).
        filters: a filter for each dilation and channel (dilations, channels, 3, 3).
        dilations: the dilations, rising.

    Returns:
        The sum (batch, height, width, channels) in float32, or float64 if any input is; so is the computation.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (x, filters, dilations))
    return torch.ops.visionmix.dilated_filters(x, filters, dilations)


def _reference(arguments: tuple[Tensor, Tensor, list[int]]) -> Tensor:
    return _forward(*arguments)


def _forward(x: Tensor, filters: Tensor, dilations: list[int]) -> Tensor:
    dtype = dispatch.compute_dtype(x, filters)
    channels, largest = x.shape[3], dilations[-1]
    # Not by F.pad, whose gradient adds up in no fixed order on a GPU.
    x = _extended(_extended(x.to(dtype), 1, largest), 2, largest).permute(0, 3, 1, 2)
    out = None
    for weight, dilation in zip(filters.to(dtype).unsqueeze(2), dilations, strict=True):
        spare = largest - dilation
        seen = x[:, :, spare:-spare, spare:-spare] if spare else x
        y = F.conv2d(seen, weight, dilation=dilation, groups=channels)
        out = y if out is None else out + y
    return out.permute(0, 2, 3, 1).contiguous()


def _extended(x: Tensor, axis: int, by: int) -> Tensor:
    """Return x with its first and last slice along `axis` repeated `by` times before and after it."""
    sizes = [-1] * x.dim()
    sizes[axis] = by
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
    return torch.cat([first.expand(sizes), x, last.expand(sizes)], dim=axis)


def _fake(x: Tensor, filters: Tensor, dilations: list[int]) -> Tensor:
    return x.new_empty(x.shape, dtype=dispatch.compute_dtype(x, filters))


def _flops(x, filters, dilations) -> int:
    """Nine products and sums for each dilation."""
    batch, height, width, channels = x
    return 18 * filters[0] * batch * height * width * channels


register_reference_op(
    "dilated_filters", "(Tensor x, Tensor filters, int[] dilations) -> Tensor", _forward, _flops, _fake
)
