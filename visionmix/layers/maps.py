"""Maps (batch, height, width, channels) as a layer wants them: with channels first, zeros around, another size."""

from functools import lru_cache

import torch
import torch.fx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from visionmix.graphs import may_branch_on_sizes, may_keep
from visionmix.layers.half_precision import at_least_float32

_A = -0.75  # of the cubic convolution kernel, as `torch.nn.functional.interpolate` has it


def channels_first(x: Tensor) -> Tensor:
    """Return x (batch, height, width, channels) as (batch, channels, height, width), on a CPU dense in that order.

    For convolutions that mix channels. On a GPU the view stays, which is channels-last, as tensor cores want it. Given
    a permuted view, PyTorch on a CPU copies the weight into the view's order at every call, beside oneDNN's own copy,
    and the memory of both goes back to the system each time: vmamba_tiny met 5,000 page faults an image of 224 pixels,
    and none with this. On a 14x14 map with 384 channels it makes a 3x3 convolution to 768 take 5 ms instead of 8; on
    large maps the view is faster (128x128, 192 to 384: 25 ms against 32). Weights in channels-last order
    (``model.to(memory_format=torch.channels_last)``) are copied once only: 2.5 and 25.
    """
    return _channels_first(x)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _channels_first(x: Tensor) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if x.device.type == "cpu" else x


def channels_last(x: Tensor) -> Tensor:
    """Return x (batch, channels, height, width) as (batch, height, width, channels), on a CPU dense in that order.

    For a convolution's output that begins a stage. The sums of a residual stream lie as their first summand does, so
    that one map with channels first makes every norm and every linear layer of its stage copy what it reads.
    """
    return _channels_last(x)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _channels_last(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return x.contiguous() if x.device.type == "cpu" else x


def pad(x: Tensor, amounts: list[int]) -> Tensor:
    """Return ``torch.nn.functional.pad(x, amounts)``, or `x` itself, uncopied, where every amount is 0."""
    return _pad(x, amounts)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    if may_branch_on_sizes():
        if sum(amounts) == 0:
            return x
    return F.pad(x, amounts)


def pad_to(x: Tensor, side: int) -> Tensor:
    """Return x (batch, height, width, channels), with zeros at the bottom and on the right where it is below `side`.

    A graph that is being compiled serves maps of at least so many alone: there `x` comes back as it is.
    """
    return _pad_to(x, side)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _pad_to(x: Tensor, side: int) -> Tensor:
    if may_branch_on_sizes():
        return pad(x, [0, 0, 0, max(0, side - x.shape[2]), 0, max(0, side - x.shape[1])])
    return x


def resample_map(x: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Return x (batch, rows, columns, channels) resampled to (batch, height, width, channels).

    In float32 at least, without antialiasing, corners not aligned; bit for bit the identity at the size of `x`.

    Args:
        x: The map.
        height: Rows wanted.
        width: Columns wanted.
        mode: "bicubic" or "bilinear".
    """
    return _resample_map(x, height, width, mode)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _resample_map(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    if torch.jit.is_scripting():
        if height == x.shape[1] and width == x.shape[2]:
            return x
    else:
        # A graph compiled for all sizes resamples always (the weights at scale 1 are 0 and 1 exactly): a branch on the
        # size would compile once more for the built size. torch.jit.trace makes tensors of sizes.
        if all(same if isinstance(same, Tensor) else statically_known_true(same)
               for same in (height == x.shape[1], width == x.shape[2])):  # fmt: skip
            return x
        if torch.compiler.is_compiling():
            # Two matrix products: Inductor takes half a minute to compile one bicubic resampling of symbolic sizes, and
            # ONNX Runtime refuses to make a map smaller whose channels are last.
            y = at_least_float32(x)
            rows, columns = _weights(x.shape[1], height, mode, y), _weights(x.shape[2], width, mode, y)
            y = torch.matmul(rows, y.flatten(2)).unflatten(2, (-1, x.shape[3]))
            return torch.matmul(columns, y).to(x.dtype)
    resampled = F.interpolate(at_least_float32(x.permute(0, 3, 1, 2)), size=[height, width], mode=mode)
    return resampled.to(x.dtype).permute(0, 2, 3, 1)


def _weights(cells: int, wanted: int, mode: str, like: Tensor) -> Tensor:
    """Return the matrix (wanted, cells) that resamples one axis; cells beyond the border are those at it."""
    places = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (cells / wanted) - 0.5
    if mode == "bilinear":
        places = places.clamp(min=0.0)
    first = places.floor().unsqueeze(1)
    taps = torch.arange(-1, 3, device=like.device) if mode == "bicubic" else torch.arange(2, device=like.device)
    distance = (places.unsqueeze(1) - first - taps).abs()
    if mode == "bilinear":
        weight = 1.0 - distance
    else:
        near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
        far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
        weight = torch.where(distance <= 1, near, far)
    taken = (first.to(torch.int64) + taps).clamp(0, cells - 1)
    cell = torch.arange(cells, device=like.device)
    return torch.where(taken.unsqueeze(2) == cell, weight.unsqueeze(2), 0.0).sum(dim=1)


def pool_map(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return the means (batch, rows, columns, channels) of the windows of x (batch, height, width, channels).

    The windows are those of `torch.nn.AdaptiveAvgPool2d`, which overlap where the map is no multiple of their number.
    Its own op would be compiled, and exported to ONNX, for one size at a time.
    """
    return _pool_map(x, rows, columns)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _pool_map(x: Tensor, rows: int, columns: int) -> Tensor:
    _, height, width, channels = x.shape
    x = torch.matmul(_averaging(width, columns, x), x)
    return torch.matmul(_averaging(height, rows, x), x.flatten(2)).unflatten(2, (-1, channels))


def _averaging(length: int, bins: int, like: Tensor) -> Tensor:
    """Return the matrix (bins, length) that averages `length` cells over adaptive pooling's windows."""
    if not torch.jit.is_scripting():
        if may_keep(like):
            return _kept_averages(length, bins, like.dtype)
    return _averages(length, bins, like.dtype, like.device)


@lru_cache(maxsize=64)
def _kept_averages(length: int, bins: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _averages(length, bins, dtype, torch.device("cpu"))


def _averages(length: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    cell = torch.arange(length, device=device)
    start, end = pool_windows(length, bins, torch.arange(bins, device=device).unsqueeze(1))
    inside = (cell >= start) & (cell < end)
    return inside.to(dtype) / (end - start)


def pool_windows(length: int, bins: int, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first cell of each `window`, by number, of adaptive pooling's `bins`, and the first after it."""
    return window * length // bins, ((window + 1) * length + bins - 1) // bins
