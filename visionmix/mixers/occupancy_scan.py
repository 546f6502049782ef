"""Mamba over the voxels of a grid, column by column: OccMamba's mixer."""

from typing import Any

import torch
import torch.fx
from torch import Tensor

from visionmix.layers import GatedMixer, scaled_gate, unscaled
from visionmix.layers.order import sequence_order, take, turns_order
from visionmix.mixers.registry import register_mixer


@register_mixer("occupancy_scan")
class OccupancyScan(GatedMixer):
    """A selective scan of voxels, height first: all levels of a cell, from the lowest up, then those of the next cell.

    With ``x, z = W_in u`` and the convolution and scan S of `visionmix.layers.SelectiveScan1d` over the sequence:

        out = W_out (S(x) * silu(z))

    The default order of the cells is the published one, which the paper calls a 2-D Hilbert expansion: it reads the
    quarters of a square as a U, at every level of the division, but does not turn them as a Hilbert curve does, so that
    some steps jump. ``order="hilbert"`` is the true curve.

    Shapes: (batch, height, width, levels, dim) to the same, for every size; a map (batch, height, width, dim) has one
    level.

    Source: OccMamba (Li et al. 2024, arXiv 2408.09859), whose configurations read one order in one direction.

    Args:
        dim: Channels.
        order: The scan order of the cells. A name that ends in "_reversed" reads the levels downwards as well; a padded
            step of an order is a cell of zeros.
        **options: `expand`, `d_state`, `dt_rank` and `d_conv` of `visionmix.layers.GatedMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state`, `dt_rank` or `d_conv` is below 1, or there is no such
            `order`, or it joins several.
    """

    def __init__(self, dim: int, *, order: str = "u_order", **options: Any) -> None:
        super().__init__(dim, **options)
        self.order = sequence_order(order)
        self.scan = self.new_scan()

    def forward(self, x: Tensor) -> Tensor:
        u = x
        batch, height, width, levels, dim = _with_levels(x).shape
        x, z = self.in_proj(x.reshape(batch, height * width * levels, dim)).chunk(2, dim=-1)
        index, inverse = turns_order(self.order, levels, height, width, False, x)
        y, scale = scaled_gate(take(self.scan(take(x, index)), inverse), self.act(z))
        return unscaled(self.proj(y), scale).reshape(u.shape)


@torch.fx.wrap
def _with_levels(x: Tensor) -> Tensor:
    return x.unsqueeze(3) if x.ndim == 4 else x
