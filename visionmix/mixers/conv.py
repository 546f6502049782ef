"""A depthwise convolution: the baseline for mixers that look further."""

from typing import Any

from torch import Tensor, nn

from visionmix.mixers.registry import register_mixer


@register_mixer("conv")
class DepthwiseConv(nn.Module):
    """``W_o act(depthwise(x))``: each channel sees the `kernel_size` x `kernel_size` cells around a cell.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: ConvNeXt's depthwise convolutions (Liu et al. 2022, arXiv 2201.03545), used as a mixer.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel; an odd number.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(self, dim: int, kernel_size: int = 7, **dd: Any) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
