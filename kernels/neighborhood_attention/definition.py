"""Neighborhood attention as its definition is written: softmax over all pairs of tokens, -inf outside windows."""

import itertools
import math

import torch
from torch import Tensor


def axis_visible(size: int, kernel: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Return which keys each query of an axis sees, bool (size, size), by NATTEN's rule."""
    visible = torch.zeros(size, size, dtype=torch.bool)
    for query, key in itertools.product(range(size), repeat=2):
        if query % dilation != key % dilation:
            continue
        length = math.ceil((size - query % dilation) / dilation)
        i, j = query // dilation, key // dilation
        group = (i // stride) * stride
        if causal:
            leader = min(group + stride - 1, length - 1)
            visible[query, key] = leader - kernel < j <= i
        else:
            center = min(group + stride // 2, length - 1)
            left, right = kernel // 2, (kernel - 1) // 2
            center = min(max(center, left), length - 1 - right)
            visible[query, key] = center - left <= j <= center + right
    return visible


def pairwise(tables: list[Tensor]) -> list[Tensor]:
    """Turn (n_a, n_a) of each axis a into views that broadcast to (n_1, n_2, ..., n_1, n_2, ...)."""
    axes = len(tables)
    views = []
    for axis, table in enumerate(tables):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = table.shape
        views.append(table.reshape(shape))
    return views


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    relative_position_bias: Tensor | None = None,
    circular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp); arguments and shapes as `visionmix.kernels.na2d`, one window entry per axis."""
    grid = query.shape[1:-2]
    tokens = math.prod(grid)
    groups = query.shape[-2] // key.shape[-2]
    q = query.flatten(1, -3).transpose(1, 2)
    k, v = (x.flatten(1, -3).transpose(1, 2).repeat_interleave(groups, dim=1) for x in (key, value))
    positions = [torch.arange(n) for n in grid]
    # Steps of the dilation from query to key, and whether both are in one residue class.
    steps = pairwise([(p - p[:, None]).div(d, rounding_mode="floor") for p, d in zip(positions, dilation, strict=True)])
    alike = pairwise([(p - p[:, None]) % d == 0 for p, d in zip(positions, dilation, strict=True)])
    if circular:
        distance = sum((s.double() / ((size + 1) / 2)) ** 2 for s, size in zip(steps, kernel_size, strict=True))
        before = [s <= 0 if causal else torch.tensor(True) for s, causal in zip(steps, is_causal, strict=True)]
        conditions = [distance < 1 - 1e-9, *alike, *before]
    else:
        arguments = zip(grid, kernel_size, stride, dilation, is_causal, strict=True)
        conditions = pairwise([axis_visible(*argument) for argument in arguments])
    visible = torch.tensor(True)
    for condition in conditions:
        visible = visible & condition
    visible = visible.reshape(tokens, tokens)
    scores = scale * q @ k.transpose(-1, -2)
    if relative_position_bias is not None:
        index = [(s + size - 1).clamp(0, 2 * size - 2) for s, size in zip(steps, kernel_size, strict=True)]
        scores = scores + relative_position_bias[(slice(None), *index)].reshape(-1, tokens, tokens)
    scores = scores.masked_fill(~visible, -math.inf)
    if additional_keys is not None:
        extra = additional_keys.transpose(1, 2).repeat_interleave(groups, dim=1)
        scores = torch.cat((scores, scale * q @ extra.transpose(-1, -2)), dim=-1)
        v = torch.cat((v, additional_values.transpose(1, 2).repeat_interleave(groups, dim=1)), dim=2)
    out = scores.softmax(-1) @ v
    lse = scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)
