"""One selective scan whose states are joined with those of neighbours on the map: Spatial-Mamba's mixer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.kernels.dilated_filters import dilated_filters_op
from visionmix.layers import ScanLayerNorm, StateScan2d, scaled_gate, scan_sizes, unscaled
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names

_DILATIONS = (1, 3, 5)


@register_mixer("state_fusion")
class StateFusion(nn.Module):
    """A scan of one state per channel, dilated depthwise filters over the states, and the readout after them.

    With ``x, z = W_in u``, ``x = silu(depthwise3x3(x))`` and the states h of `visionmix.layers.StateScan2d`, a map:

        s   = sum over d of alpha_d filter_d(h),  3x3 filters of dilation d = 1, 3, 5
        out = W_out (norm(C s + D x) * silu(z))

    At the border the filters see its cells again. The published code merges them into one 11x11 filter for evaluation,
    whose products with zeros are not made here; the result is the same.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Spatial-Mamba (Xiao et al. 2024, arXiv 2410.15091).

    Args:
        dim: Channels.
        expand: Channels of the scan over `dim`.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        d_conv: Rows and columns of the depthwise convolution, an odd number.
        order: The scan order, of which the first direction is taken.
        norm_eps: Epsilon of the norm.

    Raises:
        ValueError: `expand` leaves no channel, `dt_rank` is below 1, `d_conv` is even, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        order: str = "raster",
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv={d_conv} is even; give an odd number, so that a window has a middle")
        inner, rank = scan_sizes(dim, expand, dt_rank)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, **dd)
        self.act = nn.SiLU()
        self.scan = StateScan2d(inner, direction_names(order)[0], dt_rank=rank, **dd)
        self.dilations = list(_DILATIONS)
        self.filters = nn.Parameter(torch.ones(len(_DILATIONS), inner, 3, 3, **dd))
        self.alpha = nn.Parameter(torch.ones(len(_DILATIONS), **dd))
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        states, C = self.scan(x)
        states = dilated_filters_op(states, self.filters * self.alpha.view(-1, 1, 1, 1), self.dilations)
        y, scale = scaled_gate(self.norm(torch.addcmul(states * C, self.scan.D, x)), self.act(z))
        return unscaled(self.proj(y), scale)
