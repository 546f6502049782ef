"""Patch embeddings that look at several sizes of patches."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.maps import channels_first, channels_last, resample_map


class MultiScalePatches(nn.Module):
    """Square patches of several sizes around the same centres, and one linear map of all their pixels together.

    The centres lie `stride` apart, the width of the smallest patches; larger ones reach into zeros around the map. A
    map that `stride` does not divide is enlarged first (bicubic) until it does. One convolution computes everything:
    its kernel is the sum of the kernels of all sizes, each padded with zeros.

    Shapes: (batch, height, width, dim), or with `images` (batch, dim, height, width), to (batch,
    ceil(height / stride), ceil(width / stride), out_dim).

    Source: RaftMLP (Tatsunami and Taki 2021, arXiv 2108.04384), after the cross-scale embedding of CrossFormer (Wang
    et al. 2021, arXiv 2108.00154), whose sizes have channels of their own.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        stride: Pixels from one patch to the next.
        scales: Widths of the patches over `stride`, rising from 1.
        images: Whether the input has its channels first, as a stem's.

    Raises:
        ValueError: `scales` do not rise from 1, or patches of different sizes have no common centre.
    """

    images: Final[bool]

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int = 2,
        *,
        scales: Sequence[int] = (1, 2),
        images: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        scales = list(scales)
        if not scales or scales[0] != 1 or scales != sorted(set(scales)):
            raise ValueError(f"scales={tuple(scales)} do not rise from 1; give whole numbers such as (1, 2)")
        if any((scale - 1) * stride % 2 for scale in scales):
            raise ValueError(
                f"scales={tuple(scales)} of stride={stride} have no common centre; give odd scales or an even stride"
            )
        self.images = images
        self.stride = stride
        self.sizes = [scale * stride for scale in scales]
        # The pixels of a patch of every size, one size after another.
        pixels = sum(size * size for size in self.sizes)
        self.weight = nn.Parameter(torch.empty(out_dim, dim, pixels, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw weight and bias as PyTorch draws those of a linear layer."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that a map of `height` by `width` becomes."""
        return -(-height // self.stride), -(-width // self.stride)

    def kernel(self) -> Tensor:
        """Return the convolution's kernel (out_dim, dim, rows, columns), as large as the largest patch."""
        kernels = torch.jit.annotate(list[Tensor], [])
        start = 0
        for size in self.sizes:
            pixels = self.weight[:, :, start : start + size * size].unflatten(2, (size, size))
            kernels.append(F.pad(pixels, [(self.sizes[-1] - size) // 2] * 4))
            start += size * size
        return torch.stack(kernels).sum(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.images:
            x = x.permute(0, 2, 3, 1)
        rows, columns = (x.shape[1] + self.stride - 1) // self.stride, (x.shape[2] + self.stride - 1) // self.stride
        x = channels_first(resample_map(x, rows * self.stride, columns * self.stride))
        padding = (self.sizes[-1] - self.stride) // 2
        return channels_last(F.conv2d(x, self.kernel(), self.bias, stride=self.stride, padding=padding))
