"""Downsamplers between the stages of a hierarchical backbone, NHWC in and out."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.fx
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.graphs import may_branch_on_sizes
from visionmix.layers.fold import fold_before, fold_behind
from visionmix.layers.maps import channels_first, channels_last, pad_to
from visionmix.layers.stem import Stem

_NORM = partial(LayerNorm, eps=1e-5)


class ConvDownsample(nn.Module):
    """A convolution of stride 2 and a norm over channels: ``norm(conv(x))``.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim) for odd kernels; to
    (batch, height // 2, width // 2, out_dim) for `kernel_size` 2, where a map of one row or column is padded to two.

    Source: the third downsampler of VMamba's code (Liu et al. 2024, arXiv 2401.10166), which ViG takes over; with
    kernel 2, the patch embeddings of PVT (Wang et al. 2021, arXiv 2102.12122).

    Args:
        dim: Channels in.
        out_dim: Channels out.
        kernel_size: Rows and columns of the kernel: 2, or an odd number, with padding of half as many.
        bias: Whether the convolution has a bias.
        norm_layer: Makes the norm from `out_dim`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        kernel_size: int = 3,
        bias: bool = True,
        norm_layer: Callable[..., nn.Module] = _NORM,
        **dd: Any,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=padding, bias=bias, **dd)
        self.norm = norm_layer(out_dim, **dd)
        self.stride = 2
        self.whole = kernel_size > 2  # whether any map, however small, has a cell of output

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that a map of `height` by `width` becomes."""
        return ((height + 1) // 2, (width + 1) // 2) if self.whole else (max(height // 2, 1), max(width // 2, 1))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the convolution, for inference."""
        self.norm = fold_behind(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole:
            x = pad_to(x, 2)
        return self.norm(channels_last(self.conv(channels_first(x))))


class ConvsDownsample(Stem):
    """Convolutions one after another on maps, with the arguments of `Stem`.

    Shapes: (batch, height, width, dim) to (batch, rows, columns, channels of the last convolution).

    Source: a 1x1, a depthwise 3x3 of stride 2 and a 1x1 convolution are the downsampler of TinyViT (Wu et al. 2022,
    arXiv 2207.10666), SG-Former (Ren et al. 2023, arXiv 2308.12216) and MLLA (Han et al. 2024, arXiv 2405.16605).
    """

    def forward(self, x: Tensor) -> Tensor:
        x = channels_first(x)
        for layer in self:
            x = layer(x)
        return x


@torch.fx.wrap
def _pad_if_odd(x: Tensor) -> Tensor:
    """Return x (batch, height, width, dim), with a row and a column of zeros added unless both sides are even."""
    if may_branch_on_sizes():
        if x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0:
            return x
    return F.pad(x, [0, 0, 0, 1, 0, 1])


class NormConvDownsample(nn.Module):
    """``conv(norm(x))``, a norm over channels and a convolution of 2x2 patches.

    Cells beyond the last whole patch are left out, and a map of one row or column is padded to two. With `whole`, an
    odd side is padded instead. Zeros go to the bottom and to the right, behind the norm.

    Shapes: (batch, height, width, dim) to (batch, height // 2, width // 2, out_dim); with `whole` to (batch,
    ceil(height / 2), ceil(width / 2), out_dim).

    Source: ConvNeXt (Liu et al. 2022, arXiv 2201.03545).

    Args:
        dim: Channels in.
        out_dim: Channels out.
        norm_layer: Makes the norm from `dim`.
        whole: Whether odd sides are padded.
    """

    whole: Final[bool]

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        norm_layer: Callable[..., nn.Module] = _NORM,
        whole: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, **dd)
        self.stride = 2
        self.whole = whole

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that a map of `height` by `width` becomes."""
        return ((height + 1) // 2, (width + 1) // 2) if self.whole else (max(height // 2, 1), max(width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = _pad_if_odd(x) if self.whole else pad_to(x, 2)
        return channels_last(self.conv(channels_first(x)))


def patch_cells(x: Tensor) -> list[Tensor]:
    """Return the four cells of every 2x2 patch of x (batch, height, width, dim), column by column.

    An odd side is padded by zeros. Each is (batch, ceil(height / 2), ceil(width / 2), dim).
    """
    x = _pad_if_odd(x)
    # These are whole patches whether a side is even, or odd and padded, or even and padded all the same.
    return [x[:, :-1:2, :-1:2], x[:, 1::2, :-1:2], x[:, :-1:2, 1::2], x[:, 1::2, 1::2]]


class PatchMerging(nn.Module):
    """Each 2x2 patch as one vector, a norm over it and a linear map without bias.

    The cells of a patch follow in column-major order: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). An odd side is
    padded by zeros at the bottom or on the right.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim).

    Source: Swin (Liu et al. 2021, arXiv 2103.14030).

    Args:
        dim: Channels in.
        out_dim: Channels out.
        norm_layer: Makes the norm from ``4 * dim``.
    """

    def __init__(self, dim: int, out_dim: int, *, norm_layer: Callable[..., nn.Module] = _NORM, **dd: Any) -> None:
        super().__init__()
        self.stride = 2
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that a map of `height` by `width` becomes."""
        return (height + 1) // 2, (width + 1) // 2

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the linear map, for inference."""
        self.norm = fold_before(self.norm, self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(torch.cat(patch_cells(x), dim=-1)))
