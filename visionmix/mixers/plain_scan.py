"""Selective scans along continuous paths, with one set of parameters: PlainMamba's mixer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers import ScanMixer, SelectiveScan2d, scaled_gate, unscaled, zero_token
from visionmix.layers.kept import conv_kept
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names


@register_mixer("plain_scan")
class PlainScan(ScanMixer):
    """Four scans of the map along snakes, which share their parameters and know the direction of each step.

    With ``x, z = W_in u + b_in`` and the scans S of `visionmix.layers.SelectiveScan2d`, whose B has a learned vector
    added for the move that led to each step:

        out = W_out (sum over directions of S(silu(depthwise7x7(x))) * silu(z)) + b_out

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: PlainMamba (Yang et al. 2024, arXiv 2403.17695).

    Args:
        dim: Channels.
        d_conv: Rows and columns of the depthwise convolution, an odd number.
        order: A scan order, whose directions are the order, its transpose and the reverses of both, or one of
            `visionmix.scans.direction_sets()`.
        permute: "all" reads everything in the orders, as in the paper. "input" reads x alone in them, as the published
            code does and its weights need: step t takes its pixel from the order, but step size, B and C from cell t in
            raster order.
        bias_scale: Factor of the steps' bias. The published code adds it twice, once in the projection and once in the
            scan, so its weights are run with 2.0.
        **options: `expand`, `d_state` and `dt_rank` of `visionmix.layers.ScanMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, `d_conv` is even, `permute` is
            unknown, or there is no such `order`.
    """

    has_bias = True

    def __init__(
        self,
        dim: int,
        *,
        d_conv: int = 7,
        order: str = "plainmamba",
        permute: str = "all",
        bias_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv={d_conv} is even; give an odd number, so that a window has a middle")
        inner, dd = self.inner, self.factory_kwargs()
        self.conv = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, **dd)
        reading = {"shared": True, "permute": permute, "moves": True, "bias_scale": bias_scale}
        self.scan = SelectiveScan2d(inner, direction_names(order), **self.sizes, **reading, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.close(self.scan(self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)), z)

    @torch.jit.ignore
    def scan_kept(
        self, x: Tensor, kept: Tensor, grid: tuple[int, int], align: bool = True, merge: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the scans' output and the gate, as `close` takes them, of tokens that are left of a map.

        The convolution sees zeros in the places of the others.

        Args:
            x: The tokens, (batch, tokens, dim), in row-major order of their cells.
            kept: Their cells, int64 (batch, tokens), rising.
            grid: Rows and columns of the map.
            align: Whether the scans' states cross the gaps; see `visionmix.layers.SelectiveScan2d.forward_kept`.
            merge: "none" for each scan's output, (batch, tokens, scans, channels), which are to be summed; None for
                their sum.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.scan.forward_kept(self.act(conv_kept(self.conv, x, kept, grid)), kept, grid, align, merge), z

    def close(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the mixed tokens (..., dim) of the scans' output and the gate before its activation."""
        y, scale = scaled_gate(y, self.act(z))
        return unscaled(self.proj(y), scale, self.proj(zero_token(y)))
