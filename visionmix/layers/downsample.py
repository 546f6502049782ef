"""Downsamplers between the stages of a hierarchical backbone, NHWC in and out."""

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.layout import channels_first


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 and a LayerNorm over channels.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim).

    Source: the third downsampler of VMamba's code (Liu et al. 2024, arXiv 2401.10166), which ViG takes over.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        bias: Whether the convolution has a bias.
        norm_eps: Epsilon of the norm.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        bias: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=bias, **dd)
        self.norm = nn.LayerNorm(out_dim, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(channels_first(x)).permute(0, 2, 3, 1))


@torch.fx.wrap
def _pad_if_odd(x: Tensor) -> Tensor:
    """Return x (batch, height, width, dim), with a row and a column of zeros behind it unless both sides are even."""
    # A compiled graph pads always: a branch on the size would compile once more for every parity.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0:
            return x
    return F.pad(x, [0, 0, 0, 1, 0, 1])


class PatchMerging(nn.Module):
    """Each 2x2 patch as one vector, a LayerNorm over it and a linear map without bias.

    The cells of a patch follow in column-major order: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). An odd side is
    padded by zeros at the bottom or on the right.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim).

    Source: Swin (Liu et al. 2021, arXiv 2103.14030).

    Args:
        dim: Channels in.
        out_dim: Channels out.
        norm_eps: Epsilon of the norm.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = _pad_if_odd(x)
        # These are whole patches whether a side is even, or odd and padded, or even and padded all the same.
        cells = [x[:, :-1:2, :-1:2], x[:, 1::2, :-1:2], x[:, :-1:2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))
