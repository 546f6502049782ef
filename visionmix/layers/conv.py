"""Convolutions between neighbours on NHWC maps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DepthwiseConvNormAct(nn.Module):
    """``act(norm(conv(x)))`` with a depthwise convolution without bias and a batch normalisation.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel, an odd number.
        act_layer: Makes the activation.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
