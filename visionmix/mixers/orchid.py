"""A convolution over the whole map whose kernel comes from the map: Orchid's mixer."""

from typing import Any, Final

import torch
from torch import Tensor, nn

from visionmix.layers import at_least_float32, scaled_gate, unscaled, zero_token
from visionmix.mixers.registry import register_mixer

_KERNELS = ("magnitude", "correlation")


@register_mixer("orchid")
class DataDependentConv(nn.Module):
    """A global convolution with a kernel that depends on the input, beside a short fixed one, gated.

    With ``v, g = depthwise3x3(W x)``, F the orthonormal Fourier transform of each channel's map and c, a, b short
    depthwise convolutions,

        spectrum = |F(c(v))|                           (kernel="magnitude")
                 = conj(F(a(v))) F(b(v))               (kernel="correlation": of a(v) with b(v))
        y        = F^-1(spectrum F(v)) + depthwise(v)
        out      = W_o (g * y) + b_o

    Both spectra are blind to where things lie, so a shifted map, around whose borders the transforms wrap, has the
    shifted result. Transforms are computed in float32 at least, in a time that is linear in the cells but for a
    logarithm.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Orchid (Karami and Ghodsi 2024, arXiv 2402.18508), from the paper, which has no code. There it runs along
    sequences, with a fixed kernel that a network makes of positions; here over maps, with one of `kernel_size`.

    Args:
        dim: Channels.
        kernel: "magnitude" or "correlation".
        kernel_size: Rows and columns of the short convolutions, an odd number.

    Raises:
        ValueError: `kernel` is unknown, or `kernel_size` is even.
    """

    correlates: Final[bool]

    def __init__(self, dim: int, kernel: str = "magnitude", kernel_size: int = 3, **dd: Any) -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ValueError(f"kernel={kernel!r} is unknown; give one of {', '.join(map(repr, _KERNELS))}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        self.correlates = kernel == "correlation"

        def short(copies: int, bias: bool) -> nn.Conv2d:
            out = copies * dim
            return nn.Conv2d(
                dim, out, kernel_size, padding=kernel_size // 2, padding_mode="circular", groups=dim, bias=bias, **dd
            )

        self.in_proj = nn.Linear(dim, 2 * dim, **dd)
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, padding_mode="circular", groups=2 * dim, **dd)
        self.condition = short(2 if self.correlates else 1, False)
        self.local = short(1, True)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        projected = self.conv(self.in_proj(x).permute(0, 3, 1, 2))
        v, gate = projected.chunk(2, dim=1)
        condition = torch.fft.rfft2(at_least_float32(self.condition(v)), norm="ortho")
        spectrum = torch.fft.rfft2(at_least_float32(v), norm="ortho")
        if self.correlates:  # each channel's two convolutions lie side by side
            spectrum = spectrum * condition[:, 0::2].conj() * condition[:, 1::2]
        else:
            spectrum = spectrum * condition.abs()
        y = torch.fft.irfft2(spectrum, s=[height, width], norm="ortho") + self.local(v)
        y, scale = scaled_gate(y.permute(0, 2, 3, 1), gate.permute(0, 2, 3, 1))
        return unscaled(self.proj(y), scale, self.proj(zero_token(y)))
