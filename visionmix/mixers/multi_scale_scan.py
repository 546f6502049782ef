"""Selective scans at two resolutions: MSVMamba's mixer."""

from typing import Any, Final

from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import ScanLayerNorm, SelectiveScan2d, scan_sizes
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names
from visionmix.scans.order_names import join_order


@register_mixer("multi_scale_scan")
class MultiScaleScan(nn.Module):
    """One scan of the map and three of a map of half its height and width, enlarged and added.

    With ``x, z = W_in u``, the scans S of `visionmix.layers.SelectiveScan2d` and a norm that both branches share:

        full = norm(S_1(silu(depthwise3x3(x))))
        low  = enlarge(sum over the three directions of norm(S_2(silu(depthwise7x7, stride 2 (x)))))
        out  = W_out (se(full + low) * silu(z))

    The full map is read in the first of the order's four directions. The small one is read in the other three, one
    after another as one sequence with one set of parameters, so that the state crosses from each into the next, as in
    the published code. With `merged_norm` the norm comes once, behind the enlarged sum:

        y   = norm(S_1(...) + enlarge(sum over the three directions of S_2(...)))
        out = W_out (se(y) * silu(z))    (without gate: W_out se(y))

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: MSVMamba (Shi et al. 2024, arXiv 2405.14174); the merged norm, the nearest cells and the missing gate are
    its authors' later release, MSVMambav3.

    Args:
        dim: Channels.
        expand: Channels of the scans over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projections; None for ``ceil(dim / 16)``.
        se_reduction: Divisor of the squeeze-and-excitation's channels; None for no squeeze-and-excitation.
        order: A scan order, whose directions are the order, the reverse, its transpose and the reverse of that, or one
            of the `visionmix.scans.direction_sets()` with four directions.
        norm_eps: Epsilon of the norm.
        gate: Whether half of the input's projection gates the output.
        merged_norm: Whether the norm comes once, behind the sum of both branches.
        enlarge: How the small map is enlarged, "bilinear" or "nearest".

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, there is no such `order`, it does not
            have four directions, or `enlarge` is unknown.
    """

    gate: Final[bool]
    merged_norm: Final[bool]

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        se_reduction: int | None = 8,
        order: str = "raster",
        norm_eps: float = 1e-5,
        gate: bool = True,
        merged_norm: bool = False,
        enlarge: str = "bilinear",
        **dd: Any,
    ) -> None:
        super().__init__()
        if enlarge not in ("bilinear", "nearest"):
            raise ValueError(f"enlarge={enlarge!r} is unknown; give 'bilinear' or 'nearest'")
        inner, rank = scan_sizes(dim, expand, dt_rank)
        names = direction_names(order)
        if len(names) != 4:
            raise ValueError(f"order={order!r} has {len(names)} directions; give one with four, such as 'raster'")
        full, transposed, backward, transposed_backward = names
        low = join_order((backward, transposed, transposed_backward))
        self.gate = gate
        self.merged_norm = merged_norm
        self.enlarge = enlarge
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.full_conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, **dd)
        self.low_conv = nn.Conv2d(inner, inner, kernel_size=7, stride=2, padding=3, groups=inner, **dd)
        self.act = nn.SiLU()
        self.full_scan = SelectiveScan2d(inner, (full,), dt_rank=rank, d_state=d_state, **dd)
        merge = "sum" if merged_norm else "none"
        self.low_scan = SelectiveScan2d(inner, (low,), dt_rank=rank, d_state=d_state, merge=merge, **dd)
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)
        self.se = nn.Identity()
        if se_reduction is not None:
            self.se = SqueezeExcite(inner, rd_channels=max(1, inner // se_reduction), bias=False, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = self.in_proj(x)
        z = x
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = x.contiguous().permute(0, 3, 1, 2)  # copied once here, else by each convolution
        y = self.full_scan(self.act(self.full_conv(x)).permute(0, 2, 3, 1))
        low = self.low_scan(self.act(self.low_conv(x)).permute(0, 2, 3, 1))
        if not self.merged_norm:
            y, low = self.norm(y).to(x.dtype), self.norm(low).to(x.dtype).sum(dim=3)
        y = y.permute(0, 3, 1, 2) + F.interpolate(low.permute(0, 3, 1, 2), size=[height, width], mode=self.enlarge)
        if self.merged_norm:
            y = self.norm(y.permute(0, 2, 3, 1)).to(x.dtype).permute(0, 3, 1, 2)
        y = self.se(y).permute(0, 2, 3, 1)
        return self.proj(y * self.act(z) if self.gate else y)
