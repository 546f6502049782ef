"""Selective scans of a map in four directions: VMamba's mixer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers import ScanLayerNorm, SelectiveScan2d, scan_sizes
from visionmix.layers.by_name import LayerSpec, layer_maker
from visionmix.layers.kept import conv_kept
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names


@register_mixer("cross_scan")
class CrossScan(nn.Module):
    """The 2D selective scan: each direction reads the map as a sequence, with its own parameters, and all are summed.

    With ``x, z = W_in u`` (``z`` with `gate` alone) and the scans S of `visionmix.layers.SelectiveScan2d`:

        y   = norm(sum over directions of S(act(depthwise3x3(x))))
        out = W_out (y * act(z))    (without gate: W_out y)

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: VMamba (Liu et al. 2024, arXiv 2401.10166).

    Args:
        dim: Channels.
        expand: Channels of the scan over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        gate: Whether half of the input's projection gates the output, as in Mamba and VMamba's first version.
        conv_bias: Whether the depthwise convolution has a bias.
        order: A scan order, whose directions are the order, its transpose and the reverses of both, or one of
            `visionmix.scans.direction_sets()`.
        norm_eps: Epsilon of the norm after the scans.
        act_layer: Makes the activation; SiLU, but GELU in Mamba-YOLO (Wang et al. 2024, arXiv 2406.05835).

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 1.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        gate: bool = False,
        conv_bias: bool = False,
        order: str = "raster",
        norm_eps: float = 1e-5,
        act_layer: LayerSpec = nn.SiLU,
        **dd: Any,
    ) -> None:
        super().__init__()
        inner, rank = scan_sizes(dim, expand, dt_rank)
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, bias=conv_bias, **dd)
        self.act = layer_maker("act_layer", act_layer)()
        self.scan = SelectiveScan2d(inner, direction_names(order), dt_rank=rank, d_state=d_state, **dd)
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self._enter(x)
        return self.close(self.scan(self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)), z)

    @torch.jit.ignore
    def scan_kept(
        self, x: Tensor, kept: Tensor, grid: tuple[int, int], align: bool = True, merge: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the scans' output and the gate of tokens that are left of a map, as `PlainScan.scan_kept` does."""
        x, z = self._enter(x)
        return self.scan.forward_kept(self.act(conv_kept(self.conv, x, kept, grid)), kept, grid, align, merge), z

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.in_proj(x)
        if not self.gate:
            return x, x
        x, z = x.chunk(2, dim=-1)
        return x, z

    def close(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the mixed tokens (..., dim) of the scans' output and the gate before its activation.

        Without a gate, nothing but the type of `z` is read.
        """
        y = self.norm(y).to(z.dtype)
        if self.gate:
            y = y * self.act(z)
        return self.proj(y)
