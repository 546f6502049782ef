"""A convolution as long as the sequence, whose kernel is coarser the further it reaches: SGConv."""

import math
from typing import Any, Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.long_convolution import long_convolution_op
from visionmix.layers import OrderedMixer, at_least_float32, scaled, unscaled
from visionmix.mixers.registry import register_mixer
from visionmix.scans.cells import numbered

_MODES = ("cat", "sum")


@register_mixer("structured_global_conv")
class StructuredGlobalConv(OrderedMixer):
    """A depthwise convolution over all tokens, from learned pieces that are stretched over longer and longer distances.

    Each channel has n pieces p_i of `kernel_dim` numbers, which linear interpolation stretches to s_i times as many:

        kernel = [a^(n-1) p_0, a^(n-2) stretch(p_1), ..., stretch(p_(n-1))] / |the kernel at first|
                                                                        (cat: s = 1, 1, 2, 4, ...)
               = sum_i a^(n-1-i) [stretch(p_i), 0, ..., 0] / |the kernel at first|
                                                                        (sum: s = 1, 2, 4, ...)
        y_t    = sum_(j <= t) kernel_(t-j) x_j + sum_(j > t) kernel'_(j-t-1) x_j + D x_t   (kernel' if bidirectional)
        out    = W gelu(y) + b

    with a rising from `decay_min` for the first channel to `decay_max` for the last. Parameters grow with the logarithm
    of the distance. The kernel reaches as far as the tokens of the built map; beyond it is 0. The convolution is a
    product of Fourier transforms, in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells keep their places in the sequence.

    Source: SGConv (Li et al. 2022, arXiv 2210.09298). Its code takes the kernel's first norm at the first forward pass;
    here it is taken where the pieces are drawn.

    Args:
        dim: Channels.
        grid_size: Rows and columns of the built map.
        kernel_dim: Numbers of a piece.
        mode: "cat" for pieces end to end, "sum" for pieces that all begin at 0.
        bidirectional: Whether tokens see those behind them too.
        channels: Kernels of each channel, all of whose outputs W reads.
        decay_min: Factor a of the first channel.
        decay_max: Factor a of the last channel.
        order: The scan order in which the tokens are read; see `visionmix.scans`. A padded step of an order is a token
            of zeros.

    Raises:
        ValueError: `kernel_dim` or `channels` is below 1, `mode` is unknown, or there is no such `order`, or it joins
            several.
    """

    undecayed = ("pieces", "D")
    bidirectional: Final[bool]
    concatenated: Final[bool]
    kernel_norm: Tensor

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int] = (14, 14),
        kernel_dim: int = 16,
        mode: str = "cat",
        bidirectional: bool = True,
        channels: int = 1,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        order: str = "raster",
        **dd: Any,
    ) -> None:
        super().__init__(order)
        for name, value in (("kernel_dim", kernel_dim), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        if mode not in _MODES:
            raise ValueError(f"mode={mode!r} is unknown; give one of {', '.join(map(repr, _MODES))}")
        self.bidirectional = bidirectional
        self.concatenated = mode == "cat"
        self.decay_min, self.decay_max = float(decay_min), float(decay_max)
        tokens = grid_size[0] * grid_size[1]
        self.scales = 1 + max(0, math.ceil(math.log2(tokens / kernel_dim)))
        kernels = channels * (2 if bidirectional else 1)
        self.pieces = nn.Parameter(torch.empty(self.scales, kernels, dim, kernel_dim, **dd))
        self.D = nn.Parameter(torch.empty(channels, dim, **dd))
        self.proj = nn.Linear(channels * dim, dim, **dd)
        self.register_buffer("kernel_norm", torch.empty(kernels, dim, 1, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw pieces and D from a standard normal, as the published code does, and take the kernel's norm."""
        nn.init.normal_(self.pieces)
        nn.init.normal_(self.D)
        self.set_kernel_norm()

    @torch.jit.ignore
    def set_kernel_norm(self) -> None:
        """Divide the kernel by its present norm from now on."""
        with torch.no_grad():
            self.kernel_norm.copy_(self._whole().norm(dim=-1, keepdim=True))

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed tokens of x, both (batch, steps, dim) in the order."""
        y = F.gelu(self._convolve(x))
        bias = self.proj(x.new_zeros([1, y.shape[2]]))  # which has the type of the projection's results
        y, scale = scaled(y, bias)
        return unscaled(self.proj(y), scale, bias)

    def kernel(self, length: int) -> Tensor:
        """Return the kernels for a sequence of `length` tokens, (kernels, dim, length), by the distance of a token."""
        whole = self._whole() / at_least_float32(self.kernel_norm)
        return _fitted(whole, length)

    def _whole(self) -> Tensor:
        """Return the kernels as long as they reach, not divided by their norm."""
        pieces = at_least_float32(self.pieces)
        count, size = pieces.shape[0], pieces.shape[3]
        factor = _between(self.decay_min, self.decay_max, pieces.shape[2], pieces)
        parts = torch.jit.annotate(list[Tensor], [])
        for index in range(self.scales):
            stretch = 2 ** max(0, index - 1) if self.concatenated else 2**index
            part = F.interpolate(pieces[index], size=[size * int(stretch)], mode="linear")
            parts.append(part * (factor ** (count - 1 - index)).unsqueeze(1))
        if self.concatenated:
            return torch.cat(parts, dim=-1)
        total = parts[-1]
        for part in parts[:-1]:
            total = total + F.pad(part, [0, total.shape[2] - part.shape[2]])
        return total

    def _convolve(self, x: Tensor) -> Tensor:
        """Return y (batch, tokens, channels * dim) of x (batch, tokens, dim)."""
        x, reverse = at_least_float32(x), torch.jit.annotate(Tensor | None, None)
        kernel = self.kernel(x.shape[1])
        if self.bidirectional:
            kernel, behind = kernel.chunk(2)
            reverse = behind.flatten(0, 1).t()
        x = x.repeat(1, 1, kernel.shape[0])
        return long_convolution_op(x, kernel.flatten(0, 1).t(), reverse) + x * at_least_float32(self.D).flatten()


@torch.fx.wrap
def _between(first: float, last: float, count: int, like: Tensor) -> Tensor:
    """Return `count` numbers evenly from `first` to `last`, of float32, as published, in the type of `like`."""
    return torch.linspace(first, last, count, dtype=torch.float32, device=like.device).to(like.dtype)


@torch.fx.wrap
def _fitted(kernel: Tensor, length: int) -> Tensor:
    """Return `kernel` (..., numbers) cut off, or with zeros behind, at `length`."""
    place, reach = numbered(length, kernel), kernel.shape[-1]
    return kernel.index_select(-1, place.clamp(max=reach - 1)) * (place < reach)
