"""Embeddings of positions, which follow the image's size."""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.layers.maps import resample_map


class PositionEmbedding(nn.Module):
    """A learned embedding added to every cell of a map, resampled where the map's size is not the built one.

    Shapes: (batch, height, width, dim) to the same.

    Source: ViT's fine-tuning at other sizes (Dosovitskiy et al. 2020, arXiv 2010.11929).

    Args:
        dim: Channels.
        grid_size: Rows and columns of the built map.
        mode: How it is resampled, "bicubic" or "bilinear".
    """

    def __init__(self, dim: int, grid_size: tuple[int, int], *, mode: str = "bicubic", **dd: Any) -> None:
        super().__init__()
        self.mode = mode
        self.weight = nn.Parameter(torch.zeros(1, *grid_size, dim, **dd))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        return x + resample_map(self.weight, height, width, self.mode)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the parameter itself, so that `grid_size` becomes the built size."""
        with torch.no_grad():
            self.weight = nn.Parameter(resample_map(self.weight, *grid_size, self.mode).contiguous())

    @torch.jit.ignore
    def fit_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a file's embedding at the built size: (1, rows, columns, dim), or flat (1, rows * columns, dim).

        A flat one of another size is taken to be square. Any other tensor comes back unchanged.
        """
        _, rows, columns, dim = self.weight.shape
        if tensor.ndim == 3 and tensor.shape[-1] == dim:
            cells = tensor.shape[1]
            side = math.isqrt(cells)
            if cells == rows * columns:
                return tensor.unflatten(1, (rows, columns))
            if side * side == cells:
                tensor = tensor.unflatten(1, (side, side))
        if tensor.ndim == 4 and tensor.shape[-1] == dim:
            return resample_map(tensor, rows, columns, self.mode)
        return tensor


class ConvPosition(nn.Module):
    """A position encoding made from the map itself: a 3x3 depthwise convolution with a bias and zero padding.

    Shapes: (batch, height, width, dim) to the same.

    Source: conditional position encodings (Chu et al. 2021, arXiv 2102.10882).

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
