"""Neighborhood attention as its definition is written: softmax over all pairs of tokens, -inf outside windows."""

import itertools
import math

import torch
from torch import Tensor

from visionmix.kernels.neighborhood_attention.schema import Arguments


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


def neighborhood_attention(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of the op's arguments, in the shapes of `visionmix.kernels.na2d`."""
    grid = a.query.shape[1:-2]
    tokens = math.prod(grid)
    groups = a.query.shape[-2] // a.key.shape[-2]
    q = a.query.flatten(1, -3).transpose(1, 2)
    k, v = (x.flatten(1, -3).transpose(1, 2).repeat_interleave(groups, dim=1) for x in (a.key, a.value))
    positions = [torch.arange(n) for n in grid]
    # Steps of the dilation from query to key, and whether both are in one residue class.
    distances = [(p - p[:, None], d) for p, d in zip(positions, a.dilation, strict=True)]
    steps = pairwise([x.div(d, rounding_mode="floor") for x, d in distances])
    alike = pairwise([x % d == 0 for x, d in distances])
    if a.circular:
        distance = sum((s.double() / ((size + 1) / 2)) ** 2 for s, size in zip(steps, a.kernel_size, strict=True))
        before = [s <= 0 if causal else torch.tensor(True) for s, causal in zip(steps, a.is_causal, strict=True)]
        conditions = [distance < 1 - 1e-9, *alike, *before]
    else:
        arguments = zip(grid, a.kernel_size, a.stride, a.dilation, a.is_causal, strict=True)
        conditions = pairwise([axis_visible(*argument) for argument in arguments])
    visible = torch.tensor(True)
    for condition in conditions:
        visible = visible & condition
    visible = visible.reshape(tokens, tokens)
    scores = a.scale * q @ k.transpose(-1, -2)
    if a.relative_position_bias is not None:
        index = [(s + size - 1).clamp(0, 2 * size - 2) for s, size in zip(steps, a.kernel_size, strict=True)]
        scores = scores + a.relative_position_bias[(slice(None), *index)].reshape(-1, tokens, tokens)
    scores = scores.masked_fill(~visible, -math.inf)
    if a.additional_keys is not None:
        extra = a.additional_keys.transpose(1, 2).repeat_interleave(groups, dim=1)
        scores = torch.cat((scores, a.scale * q @ extra.transpose(-1, -2)), dim=-1)
        v = torch.cat((v, a.additional_values.transpose(1, 2).repeat_interleave(groups, dim=1)), dim=2)
    out = scores.softmax(-1) @ v
    lse = scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)
