"""Monarch Mixer's token mixer: a gated convolution as long as the sequence."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.kernels.long_convolution import long_convolution_op
from visionmix.layers import Grid, SequenceMixer, at_least_float32, scaled, unscaled, zero_token
from visionmix.layers.conv import CausalConv
from visionmix.mixers.registry import register_mixer


class ImplicitKernel(nn.Module):
    """Kernels (length, dim) of any length, computed from the position by a small network, with a decay per channel.

    With ``t = i / (max_length - 1)`` at position i, frequencies ``w_b = 2 pi f_b / max_length``, where the f_b lie
    evenly from 1e-4 to ``bands - 1``, and a vector a that is shared by all sines:

        z_i      = [t, cos(w_1 i), ..., -sin(w_1 i), ...]
        h        = sin(a (W h + b)), `depth` + 1 times, from z
        kernel_i = (W' h) exp(-t d)

    The decays d lie evenly, so that channels fall to a hundredth after 1.5 to 0.3 of `max_length`.

    Shapes: the tokens (batch, length, channels) that the kernels are for, to (length, dim), in float32 at least.

    Source: the filter of Hyena (Poli et al. 2023, arXiv 2302.10866), of the code that is published with it, which
    learns z too, at a rate of 1e-5.

    Args:
        dim: Channels.
        hidden: Width of the network.
        depth: Layers between its first and its last.
        bands: Frequencies.
        frequency: What a is at first.
        max_length: Positions over which t goes from 0 to 1. Longer kernels go on beyond.
    """

    def __init__(
        self, dim: int, hidden: int, depth: int, bands: int, frequency: float, max_length: int, **dd: Any
    ) -> None:
        super().__init__()
        self.dim, self.bands, self.max_length, self.initial = dim, bands, max_length, frequency
        widths = [2 * bands + 1] + [hidden] * (depth + 1)
        self.layers = nn.ModuleList([nn.Linear(*pair, **dd) for pair in pairwise(widths)])
        self.out = nn.Linear(hidden, dim, bias=False, **dd)
        self.frequency = nn.Parameter(torch.empty(hidden, **dd))
        self.undecayed = tuple(name for name, _ in self.named_parameters())
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the network's layers as PyTorch draws a linear layer, and set the factors of its sines."""
        for layer in (*self.layers, self.out):
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.initial)

    def forward(self, tokens: Tensor) -> Tensor:
        position = _positions(tokens)
        h = _features(position, self.bands, self.max_length).to(self.frequency.dtype)
        for layer in self.layers:
            h = torch.sin(self.frequency * layer(h))
        return at_least_float32(self.out(h)) * _decay(position, self.dim, self.max_length)


@torch.fx.wrap
def _positions(tokens: Tensor) -> Tensor:
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return torch.arange(tokens.shape[1], device=tokens.device, dtype=dtype).unsqueeze(1)


@torch.fx.wrap
def _features(position: Tensor, bands: int, max_length: int) -> Tensor:
    frequencies = torch.linspace(1e-4, bands - 1.0, bands, dtype=position.dtype, device=position.device)
    angle = 2.0 * math.pi / max_length * position * frequencies
    return torch.cat([position / (max_length - 1.0), angle.cos(), -angle.sin()], dim=1)


@torch.fx.wrap
def _decay(position: Tensor, dim: int, max_length: int) -> Tensor:
    slowest, fastest = math.log(100.0) / 1.5, math.log(100.0) / 0.3  # to a hundredth, in max_length
    rates = torch.linspace(slowest, fastest, dim, dtype=position.dtype, device=position.device)
    return torch.exp(-position / (max_length - 1.0) * rates)


@register_mixer("monarch")
class MonarchMixer(SequenceMixer):
    """A convolution with a kernel as long as the sequence, between two gates: the Hyena operator of order 2.

    With ``x_1, x_2, v = conv(W x + b).chunk(3)``, where conv is a short causal depthwise convolution, kernels k and k'
    that a network computes from the position (see `ImplicitKernel`), and a number d per channel:

        u   = x_1 v
        y_i = sum_(j <= i) k_(i - j) u_j + sum_(j > i) k'_(j - i - 1) u_j + d u_i    (the latter if bidirectional)
        out = W_o (x_2 y) + b_o

    Time grows as ``n log n`` in the n tokens: the convolution is a product of Fourier transforms, which are Monarch
    matrices. Tokens are read in raster order, and unless `bidirectional` each sees those before it alone.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells keep their places in the sequence.

    Source: Monarch Mixer (Fu et al. 2023, arXiv 2310.12109), whose code computes the same for `bidirectional`
    (M2-BERT), with k and k' whose networks share the vector of their sines; here each has its own. Without, it is the
    operator of Hyena (Poli et al. 2023, arXiv 2302.10866) as its code has it for images, which M2-ViT is built on.

    Args:
        dim: Channels.
        bidirectional: Whether tokens see those after them too.
        kernel_size: Taps of the short convolution.
        filter_dim: Width of the network that computes the kernels.
        filter_depth: Its layers between the first and the last.
        bands: Frequencies of the positions that it reads.
        frequency: Initial factor inside its sines.
        max_length: Tokens that its positions are scaled to.

    Raises:
        ValueError: a size is below 1, or `max_length` below 2.
    """

    undecayed = ("D",)

    def __init__(
        self,
        dim: int,
        bidirectional: bool = False,
        kernel_size: int = 5,
        filter_dim: int = 128,
        filter_depth: int = 1,
        bands: int = 16,
        frequency: float = 1.0,
        max_length: int = 1024,
        **dd: Any,
    ) -> None:
        super().__init__()
        least = {"kernel_size": (kernel_size, 1), "filter_dim": (filter_dim, 1), "filter_depth": (filter_depth, 0)}
        for name, (value, lowest) in (least | {"bands": (bands, 1), "max_length": (max_length, 2)}).items():
            if value < lowest:
                raise ValueError(f"{name}={value} is too small; give {lowest} or more")
        network = {"hidden": filter_dim, "depth": filter_depth, "bands": bands, "frequency": frequency}
        self.in_proj = nn.Linear(dim, 3 * dim, **dd)
        self.conv = CausalConv(3 * dim, 3 * dim, kernel_size, groups=3 * dim, **dd)
        self.kernel = ImplicitKernel(dim, max_length=max_length, **network, **dd)
        self.reverse = ImplicitKernel(dim, max_length=max_length, **network, **dd) if bidirectional else None
        self.D = nn.Parameter(torch.randn(dim, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw d from a normal distribution."""
        nn.init.normal_(self.D)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        projected = self.conv(self.in_proj(x))
        before, after, v = at_least_float32(projected).chunk(3, dim=-1)
        u = before * v
        reverse = self.reverse(x) if self.reverse is not None else None
        y = torch.addcmul(long_convolution_op(u, self.kernel(x), reverse), u, at_least_float32(self.D))
        y, scale = scaled(y * after, projected)
        return unscaled(self.proj(y), scale, self.proj(zero_token(y)))
