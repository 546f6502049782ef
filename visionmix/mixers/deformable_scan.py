"""Selective scans in four directions behind a deformable convolution: HRVMamba's mixer."""

import math
from typing import Any

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from visionmix.layers import DeformableConv, ScanLayerNorm, SelectiveScan2d, scan_sizes
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names


@register_mixer("deformable_scan")
class DeformableScan(nn.Module):
    """The 2D selective scan of VMamba with a deformable convolution in its depthwise convolution's place.

    With the deformable convolution D of `visionmix.layers.DeformableConv`, the scans S of
    `visionmix.layers.SelectiveScan2d`, and ``se(y) = y * sigmoid(W_2 relu(W_1 mean(y)))`` if `se_reduction` asks for
    it:

        out = W_out se(norm(sum over directions of S(silu(D(W_in u)))))

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: HRVMamba (Zhang et al. 2024, arXiv 2410.03174).

    Args:
        dim: Channels.
        expand: Channels of the scan over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        groups: Groups of channels that the deformable convolution moves together; None for the largest number up to
            ``ceil(dim / 16)`` that divides them.
        around: Whether a depthwise convolution stands before the projection to the offsets.
        se_reduction: Channels of the scan over the hidden channels of the squeeze-and-excitation; None for none.
        order: A scan order, whose directions are the order, its transpose and the reverses of both, or one of
            `visionmix.scans.direction_sets()`.
        norm_eps: Epsilon of the norm after the scans.

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, `groups` does not divide the
            channels, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        groups: int | None = None,
        around: bool = False,
        se_reduction: int | None = None,
        order: str = "raster",
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        inner, rank = scan_sizes(dim, expand, dt_rank)
        if groups is None:
            groups = next(count for count in range(math.ceil(dim / 16), 0, -1) if inner % count == 0)
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv = DeformableConv(inner, groups, around=around, **dd)
        self.act = nn.SiLU()
        self.scan = SelectiveScan2d(inner, direction_names(order), dt_rank=rank, d_state=d_state, **dd)
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)
        self.se = nn.Identity()
        if se_reduction is not None:
            self.se = SqueezeExcite(inner, rd_channels=max(1, inner // se_reduction), bias=False, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        y = self.norm(self.scan(self.act(self.conv(x)))).to(x.dtype)
        return self.proj(self.se(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
