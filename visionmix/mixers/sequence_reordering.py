"""Mamba over a sequence as it is and over the same sequence reordered: MambaMIL's mixer."""

from typing import Any

import torch
import torch.fx
from torch import Tensor

from visionmix.layers import GatedMixer, Grid, scaled_gate, unscaled
from visionmix.layers.order import sequence_order, take, token_order
from visionmix.mixers.registry import register_mixer
from visionmix.scans.cells import numbered


@register_mixer("sequence_reordering")
class SequenceReordering(GatedMixer):
    """Two selective scans of the tokens, in order and in strides, with their own parameters and a common gate.

    With ``x, z = W_in u`` and the convolution and scan S of `visionmix.layers.SelectiveScan1d`:

        out = W_out ((S_1(x) + restore(S_2(reorder(x)))) * silu(z))

    ``reorder`` reads every `rate`-th token from the first on, then every `rate`-th from the second on, and so on:
    tokens 0, 2, 4, 1, 3, 5 for a rate of 2. The sequence is first padded at its end with tokens of zeros to a multiple
    of `rate`; ``restore`` undoes the order and drops them.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells (a class token) keep their places in the sequence as it is read
    first, and are reordered with it.

    Source: the SR-Mamba of MambaMIL (Yang et al. 2024, arXiv 2403.06800).

    Args:
        dim: Channels.
        rate: Stride of the reordered sequence.
        order: The scan order of the cells, which is then reordered. A padded step of an order is a token of zeros.
        **options: `expand`, `d_state`, `dt_rank` and `d_conv` of `visionmix.layers.GatedMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state`, `dt_rank`, `d_conv` or `rate` is below 1, or there is no such
            `order`, or it joins several.
    """

    def __init__(self, dim: int, *, rate: int = 10, order: str = "raster", **options: Any) -> None:
        super().__init__(dim, **options)
        if rate < 1:
            raise ValueError(f"rate={rate} is too small; give 1 or more")
        self.order = sequence_order(order)
        self.in_raster = self.order == "raster"
        self.rate = rate
        self.scan = self.new_scan()
        self.reordered_scan = self.new_scan()

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.in_raster:
            y = self._scan(x)
        else:
            index, inverse = token_order(self.order, grid.height, grid.width, grid.prefix_positions, x)
            y = take(self._scan(take(x, index)), inverse)
        y, scale = scaled_gate(y, self.act(z))
        return unscaled(self.proj(y), scale)

    def _scan(self, x: Tensor) -> Tensor:
        index, inverse = _strided(x.shape[1], self.rate, x)
        return self.scan(x) + self.reordered_scan(take(x, index)).index_select(1, inverse)


@torch.fx.wrap
def _strided(length: int, rate: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, inverse): the token read at each step, -1 for padding, and the step at which each is read."""
    each = (length + rate - 1) // rate
    step = numbered(each * rate, like)
    start = step // each
    index = (step - start * each) * rate + start
    token = numbered(length, like)
    line = token // rate
    return torch.where(index < length, index, -1), (token - line * rate) * each + line
