"""Depthwise convolution with learnable spacings: ConvNeXt-dcls' mixer."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.learnable_spacings import SpacedKernel
from visionmix.mixers.registry import register_mixer


@register_mixer("dcls")
class LearnableSpacings(nn.Module):
    """A depthwise convolution whose kernel has few weights, at learned positions: ``conv(x, spacings(weight)) + bias``.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2021, arXiv 2112.03740).

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel, an odd number.
        kernel_count: Weights of each channel.
        version: How a weight is spread over the cells around its position; see `visionmix.layers.SpacedKernel`.

    Raises:
        ValueError: `kernel_size` is even, `kernel_count` is below 1, or `version` is unknown.
    """

    def __init__(self, dim: int, kernel_size: int = 17, kernel_count: int = 34, version: str = "v0", **dd: Any) -> None:
        super().__init__()
        sizes = {"kernel_size": kernel_size, "kernel_count": kernel_count, "version": version}
        self.spacings = SpacedKernel(dim, **sizes, **dd)
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_count, **dd))
        self.bias = nn.Parameter(torch.empty(dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the weights from a truncated normal of deviation 0.02, as the published model does; the bias is 0."""
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.spacings(self.weight))

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Return x convolved by a kernel (dim, 1, kernel_size, kernel_size) that was made before."""
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, self.bias, padding=kernel.shape[-1] // 2, groups=x.shape[-1])
        return y.permute(0, 2, 3, 1)
