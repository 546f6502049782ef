"""Neighborhood attention in an exported graph whose map has symbols for sizes: every query gathers its own keys.

Unlike the reference proper, this holds a copy of the keys and values for each query.
"""

import math

import torch
from torch import Tensor

from visionmix.kernels.dispatch import compute_dtype
from visionmix.kernels.neighborhood_attention.schema import Arguments, mixed_tensors


class _Axis:
    """The window of each query along one axis.

    Attributes:
        key: the key's token at each offset, int64 (queries, kernel size); tokens beyond the map's end are padding.
        steps: the offset from query to key, in steps of the dilation, (queries, kernel size).
        visible: whether the query sees that key, (queries, kernel size).
    """

    def __init__(self, size, kernel_size: int, stride: int, dilation: int, causal: bool, circular: bool, device):
        extended = size if circular else torch.sym_max(size, kernel_size * dilation)
        token = torch.arange(size, device=device).unsqueeze(1)
        residue, i = token % dilation, token // dilation
        length = (extended - residue + dilation - 1) // dilation
        if circular:
            start = i - kernel_size // 2
        elif causal:
            start = torch.minimum(i // stride * stride + stride - 1, length - 1) - kernel_size + 1
        else:
            leader = torch.minimum(i // stride * stride + stride // 2, length - 1)
            start = torch.minimum(leader - kernel_size // 2, length - kernel_size).clamp(min=0)
        j = start + torch.arange(kernel_size, device=device)
        self.visible = (j >= 0) & (j < length)
        if causal:
            self.visible = self.visible & (j <= i)
        self.steps = j - i
        self.key = j.clamp(min=0) * dilation + residue


def _pairwise(tables: list[Tensor]) -> list[Tensor]:
    """Turn (queries, kernel size) of each axis into views that broadcast to (*queries, *kernel sizes)."""
    axes = len(tables)
    views = []
    for axis, table in enumerate(tables):
        view = table
        for _ in range(axes - 1 - axis):
            view = view.unsqueeze(1)
        for _ in range(axis):
            view = view.unsqueeze(0)
        for _ in range(axis):
            view = view.unsqueeze(axes)
        for _ in range(axes - 1 - axis):
            view = view.unsqueeze(-1)
        views.append(view)
    return views


def _gather(x: Tensor, windows: list[_Axis], padding: Tensor | None) -> Tensor:
    """(batch, *grid, heads, dim) to (batch, *grid, heads, window, dim); padding or zeros beyond the map's end."""
    axes = len(windows)
    fill = x.new_zeros(()) if padding is None else padding.to(x.dtype)
    for number, window in enumerate(windows):
        axis = 1 + 2 * number
        size = x.shape[axis]
        key = window.key.flatten()
        inside = (key < size).view(-1, *[1] * (x.dim() - axis - 1))
        x = torch.where(inside, x.index_select(axis, key.clamp(max=size - 1)), fill)
        x = x.unflatten(axis, window.key.shape)
    grid, offsets = [1 + 2 * n for n in range(axes)], [2 + 2 * n for n in range(axes)]
    x = x.permute(0, *grid, 2 * axes + 1, *offsets, 2 * axes + 2)
    return x.flatten(axes + 2, 2 * axes + 1)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp of the scores); shapes as `na2d`."""
    dtype = compute_dtype(*mixed_tensors(a))
    axes = len(a.kernel_size)
    arguments = zip(a.query.shape[1:-2], a.kernel_size, a.stride, a.dilation, a.is_causal, strict=True)
    windows = [_Axis(*argument, a.circular, a.query.device) for argument in arguments]
    visible = torch.ones((), dtype=torch.bool, device=a.query.device)
    for table in _pairwise([window.visible for window in windows]):
        visible = visible & table
    steps = _pairwise([window.steps for window in windows])
    if a.circular:
        radii = [(k + 1) // 2 for k in a.kernel_size]
        whole = math.prod(radii)
        visible = visible & (sum((s * (whole // r)) ** 2 for s, r in zip(steps, radii, strict=True)) < whole**2)
    groups = a.key.shape[-2]
    # (batch, *grid, groups, heads of a group or window, dim)
    queries = a.query.to(dtype).unflatten(-2, (groups, -1)) * a.scale
    keys = _gather(a.key.to(dtype), windows, a.key_padding)
    values = _gather(a.value.to(dtype), windows, a.value_padding)
    scores = queries @ keys.transpose(-1, -2)
    if a.relative_position_bias is not None:
        index = torch.zeros((), dtype=torch.int64, device=a.query.device)
        for step, k in zip(steps, a.kernel_size, strict=True):
            index = index * (2 * k - 1) + (step + k - 1).clamp(0, 2 * k - 2)
        index = index.flatten(axes)  # (*grid, window)
        table = a.relative_position_bias.to(dtype).flatten(1)
        bias = table.index_select(1, index.flatten()).unflatten(1, index.shape)
        scores = scores + bias.unflatten(0, (groups, -1)).movedim((0, 1), (axes, axes + 1))
    hidden = ~visible.flatten(axes).unsqueeze(-2).unsqueeze(-2)
    scores = scores.masked_fill(hidden, -math.inf)
    more = None
    if a.additional_keys is not None and a.additional_values is not None:
        lead = (slice(None), *[None] * axes)
        more = a.additional_values.to(dtype).transpose(1, 2)[lead]
        extra = queries @ a.additional_keys.to(dtype).transpose(1, 2)[lead].transpose(-1, -2)
        scores = torch.cat((scores, extra), -1)
    total = scores.logsumexp(-1, keepdim=True)
    weights = (scores - total).exp()
    window = math.prod(a.kernel_size)
    out = weights[..., :window] @ values
    if more is not None:
        out = out + weights[..., window:] @ more
    return out.flatten(-3, -2).to(a.value.dtype), total.squeeze(-1).flatten(-2)
