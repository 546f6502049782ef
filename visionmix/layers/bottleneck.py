"""Bottlenecks: residual blocks of three convolutions, and a stem that ends in them."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers.downsample import ConvsDownsample
from visionmix.layers.stem import Stem, StemConv


def conv_norm(channels: int, kernel_size: int = 1, stride: int = 1, *, act: bool = True, groups: int = 1) -> StemConv:
    """Return a convolution without bias, with a batch norm and, with `act`, ReLU behind it, as ResNet has them."""
    act_layer = nn.ReLU if act else None
    return StemConv(
        channels, kernel_size, stride, bias=False, norm_layer=nn.BatchNorm2d, act_layer=act_layer, groups=groups
    )


class Bottleneck(nn.Module):
    """``relu(shortcut(x) + convs(x))``: a 1x1 convolution to a quarter of `out_dim`, a 3x3 and a 1x1 one to `out_dim`.

    Every convolution has a batch norm and no bias, and ReLU behind it but for the last. The shortcut is a 1x1
    convolution with a batch norm where the widths differ.

    Shapes: (batch, height, width, dim) to (batch, height, width, out_dim).

    Source: ResNet (He et al. 2015, arXiv 1512.03385).

    Args:
        dim: Channels in.
        out_dim: Channels out: a multiple of 4.

    Raises:
        ValueError: 4 does not divide `out_dim`.
    """

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        if out_dim % 4:
            raise ValueError(f"out_dim={out_dim} has no quarter; give a multiple of 4")
        last = conv_norm(out_dim, act=False)
        self.convs = ConvsDownsample(dim, [conv_norm(out_dim // 4), conv_norm(out_dim // 4, 3), last], **dd)
        self.shortcut = nn.Identity() if dim == out_dim else ConvsDownsample(dim, [last], **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.convs(x))


class BottleneckStem(nn.Module):
    """Two 3x3 convolutions of stride 2, with batch norms and ReLU, and bottlenecks at a quarter of the resolution.

    Shapes: (batch, in_chans, height, width) to (batch, ceil(height / 4), ceil(width / 4), embed_dim).

    Source: the stem and first stage of HRNet (Wang et al. 2019, arXiv 1908.07919).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the map: a multiple of 4.
        patch_size: Pixels a cell stands for, along each side: 4.
        width: Channels of the two convolutions.
        depth: Number of bottlenecks.

    Raises:
        ValueError: `patch_size` is not 4, or 4 does not divide `embed_dim`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 256,
        patch_size: int = 4,
        *,
        width: int = 64,
        depth: int = 2,
        **dd: Any,
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
        self.convs = Stem(in_chans, [conv_norm(width, 3, 2), conv_norm(width, 3, 2)], **dd)
        self.blocks = nn.ModuleList(
            Bottleneck(width if index == 0 else embed_dim, embed_dim, **dd) for index in range(depth)
        )
        self.stride = self.convs.stride

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        return self.convs.grid_size(height, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        for block in self.blocks:
            x = block(x)
        return x
