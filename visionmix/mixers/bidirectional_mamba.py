"""Mamba in both directions along a sequence: Vim's mixer."""

from typing import Any

import torch
from torch import Tensor

from visionmix.layers import GatedMixer, Grid, scaled_gate, unscaled
from visionmix.layers.order import sequence_order, take, token_order
from visionmix.mixers.registry import register_mixer


@register_mixer("bidirectional_mamba")
class BidirectionalMamba(GatedMixer):
    """Two selective scans of the tokens, one from each end, with their own parameters and a common gate.

    With ``x, z = W_in u`` and the convolution and scan S of `visionmix.layers.SelectiveScan1d`:

        out = W_out ((S_1(x) + reverse(S_2(reverse(x)))) / 2 * silu(z))

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells (a class token) keep their places in the sequence, and the cells are
    read in the order around them.

    Source: Vim (Zhu et al. 2024, arXiv 2401.09417).

    Args:
        dim: Channels.
        order: The scan order of the cells; the other direction is its reverse. A padded step of an order is a token of
            zeros.
        **options: `expand`, `d_state`, `dt_rank` and `d_conv` of `visionmix.layers.GatedMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state`, `dt_rank` or `d_conv` is below 1, or there is no such
            `order`, or it joins several.
    """

    def __init__(self, dim: int, *, order: str = "raster", **options: Any) -> None:
        super().__init__(dim, **options)
        self.order = sequence_order(order)
        self.in_raster = self.order == "raster"
        self.forward_scan = self.new_scan()
        self.backward_scan = self.new_scan()

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.in_raster:
            forward, backward = self._scan(x, None)
            y = forward + backward
        else:
            index, inverse = token_order(self.order, grid.height, grid.width, grid.prefix_positions, x)
            forward, backward = self._scan(take(x, index), None)
            y = take(forward + backward, inverse)
        y, scale = scaled_gate(y, 0.5 * self.act(z))
        return unscaled(self.proj(y), scale)

    @torch.jit.ignore
    def directions(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the gated outputs of both scans, each (batch, tokens, channels of the scans), before they are merged.

        Args:
            x: Tokens (batch, tokens, dim), read as they lie, whatever the order.
            positions: Their places in the longer sequence that they were kept from; see
                `visionmix.layers.SelectiveScan1d`.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        forward, backward = self._scan(x, positions)
        gate = self.act(z)
        return (forward * gate).to(gate.dtype), (backward * gate).to(gate.dtype)

    @torch.jit.ignore
    def merged(self, forward: Tensor, backward: Tensor) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim) of what `directions` returns."""
        return self.proj(0.5 * (forward + backward))

    def _scan(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        from_the_end = None if positions is None else -positions.flip(1)
        return self.forward_scan(x, positions), self.backward_scan(x.flip(1), from_the_end).flip(1)
