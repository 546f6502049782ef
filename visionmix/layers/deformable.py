"""Convolutions whose taps move."""

from typing import Any

from torch import Tensor, nn

from visionmix.kernels.dcnv4 import dcnv4_op


class DeformableConv(nn.Module):
    """A depthwise 3x3 convolution whose taps and factors are made from the map at every cell.

    That of `visionmix.kernels.dcnv4`, with ``offset_mask = W x + b``, or ``W depthwise3x3(x) + b`` with `around`. Each
    group of channels has nine offsets and nine factors; the factors are not made to sum to 1.

    Shapes: (batch, height, width, dim) to the same.

    Source: DCNv4 (Xiong et al. 2024, arXiv 2401.06197), without the projections before and after it.

    Args:
        dim: Channels.
        groups: Groups of channels, which move together.
        around: Whether a depthwise 3x3 convolution with a bias stands before the projection to offsets and factors.

    Raises:
        ValueError: `groups` does not divide `dim`.
    """

    def __init__(self, dim: int, groups: int, *, around: bool = False, **dd: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups={groups} does not divide dim={dim}; give a divisor of it")
        self.groups = groups
        self.around = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if around else nn.Identity()
        # 27 features a group; up to the next multiple of 8 more, which nothing reads, as published files have them.
        self.offset_mask = nn.Linear(dim, -(-27 * groups // 8) * 8, **dd)

    def forward(self, x: Tensor) -> Tensor:
        around = self.around(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return dcnv4_op(x, self.offset_mask(around), self.groups, 3, 1, 1, 1, 1.0)
