"""The windows of a map as tables: which keys every query sees, as tensors. Sizes may be symbols of a graph."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels.neighborhood_attention.schema import Arguments


class Window(NamedTuple):
    """The arguments that choose the keys, one value per axis of the map, but for the shape."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[int]
    circular: bool

    def flat(self) -> list[int]:
        """Return the arguments one behind the other, as an op takes them."""
        return [*self.kernel_size, *self.stride, *self.dilation, *self.is_causal, int(self.circular)]

    @classmethod
    def of(cls, flat: Sequence[int]) -> "Window":
        """Return the window whose `flat` is given."""
        axes = len(flat) // 4
        kernel_size, stride, dilation, is_causal = (flat[at : at + axes] for at in range(0, 4 * axes, axes))
        return cls(kernel_size, stride, dilation, is_causal, bool(flat[-1]))


def window_of(a: Arguments) -> Window:
    """Return the arguments of the op that choose the keys."""
    return Window(a.kernel_size, a.stride, a.dilation, a.is_causal, a.circular)


def at_most(x: Tensor, bound: Tensor | int) -> Tensor:
    """Return the smaller of each element and `bound`, which may be a symbol."""
    return torch.minimum(x, bound) if isinstance(bound, Tensor) else x.clamp(max=bound)


def window_bounds(
    query: Tensor, length: Tensor | int, kernel_size: int, stride: int, causal: bool, circular: bool
) -> tuple[Tensor, Tensor]:
    """Return (start, stop): the query sees those keys of its residue class, of `length` tokens, from start to before
    stop that are not negative. As `windows.axis_window`, but for starts that are negative where windows are cut."""
    half = kernel_size // 2
    if circular:
        start = query - half
    else:
        shift = stride - 1 if causal else stride // 2
        leader = query if stride == 1 else at_most(query // stride * stride + shift, length - 1)
        start = leader - kernel_size + 1 if causal else at_most(leader - half, length - kernel_size).clamp(min=0)
    if causal:
        return start, query + 1
    return start, at_most(start + kernel_size, length) if circular else start + kernel_size


def inside_disc(steps: Sequence[Tensor], kernel_size: Sequence[int]) -> Tensor:
    """Return `windows.in_ellipsoid` of the steps along each axis, which broadcast."""
    radii = [(k + 1) // 2 for k in kernel_size]
    whole = math.prod(radii)
    first, *others = ((s * (whole // r)) ** 2 for s, r in zip(steps, radii, strict=True))
    return sum(others, first) < whole**2


class AxisTable:
    """The window of each query along one axis.

    Attributes:
        key: the key's token at each offset, int64 (queries, kernel size); tokens beyond the map's end are padding.
        steps: the offset from query to key, in steps of the dilation, (queries, kernel size).
        visible: whether the query sees that key, (queries, kernel size).
    """

    def __init__(self, size, kernel_size: int, stride: int, dilation: int, causal: bool, circular: bool, device):
        extended = size if circular else torch.sym_max(size, kernel_size * dilation)
        token = torch.arange(size, device=device).unsqueeze(1)
        i = token // dilation
        residue = token - i * dilation  # no remainder: ONNX takes none by a symbol
        length = (extended - residue + dilation - 1) // dilation
        start, stop = window_bounds(i, length, kernel_size, stride, causal, circular)
        j = start + torch.arange(kernel_size, device=device)
        self.visible = (j >= 0) & (j < stop)
        self.steps = j - i
        self.key = j.clamp(min=0) * dilation + residue


class Tables:
    """The windows of every query of a map.

    Attributes:
        axes: the table of each axis.
    """

    def __init__(self, grid: Sequence[int], window: Window, device: torch.device):
        self.window = window
        options = zip(grid, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True)
        self.axes = [AxisTable(*each, window.circular, device) for each in options]

    def biased(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Return scores (batch, *map, heads, window) plus the bias (heads, *spans) of each offset, -inf where a query
        does not see the key."""
        if bias is not None:
            # By an embedding, whose gradient adds up in a fixed order on a GPU too.
            table = bias.to(scores.dtype).flatten(1).transpose(0, 1)
            scores = scores + F.embedding(self._bias_index(), table).movedim(-1, -2)
        return scores.masked_fill(self.hidden(), -math.inf)

    def hidden(self) -> Tensor:
        """Return whether a query does not see a key of its window, bool (*map, 1, window)."""
        visible = torch.ones((), dtype=torch.bool, device=self.axes[0].steps.device)
        for table in _pairwise([axis.visible for axis in self.axes]):
            visible = visible & table
        if self.window.circular:
            steps = _pairwise([axis.steps for axis in self.axes])
            visible = visible & inside_disc(steps, self.window.kernel_size)
        return ~visible.flatten(len(self.axes)).unsqueeze(-2)

    def _bias_index(self) -> Tensor:
        """Return each key's place in the flattened bias table, int64 (*map, window)."""
        index = torch.zeros((), dtype=torch.int64, device=self.axes[0].steps.device)
        for step, k in zip(_pairwise([axis.steps for axis in self.axes]), self.window.kernel_size, strict=True):
            index = index * (2 * k - 1) + (step + k - 1).clamp(0, 2 * k - 2)
        return index.flatten(len(self.axes))


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
