"""Rotary position encodings of maps."""

import torch
import torch.fx
from torch import Tensor, nn


@torch.fx.wrap
def _turns(x: Tensor, height: int, width: int) -> Tensor:
    """Return cosine and sine, (2, height * width, dim / 2), of the angles to turn pairs of channels of x by."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[-1] // 4
    frequencies = (1.0 / (10000 ** torch.linspace(0, 1, count, device=x.device))).to(dtype)
    rows = torch.arange(height, device=x.device).to(dtype)[:, None, None] * frequencies
    columns = torch.arange(width, device=x.device).to(dtype)[None, :, None] * frequencies
    angles = torch.cat([rows.expand(height, width, count), columns.expand(height, width, count)], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()])


@torch.fx.wrap
def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """Return x (batch, tokens, heads, dim), channels 2i and 2i + 1 of each token turned by its angle i."""
    cosine, sine = turns[0].unsqueeze(1), turns[1].unsqueeze(1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)


class RotaryMap(nn.Module):
    """Rotary position encodings of a map: q and k with pairs of neighbouring channels turned by row and column.

    The first dim / 4 pairs turn by the row, the others by the column, pair i by ``10000^(-i / (dim / 4 - 1))`` radians
    a row or column: the last frequency is 1 / 10000 itself, as the published models have it, which RoPE's would only
    approach. Computed in float32 at least.

    Shapes: q and k (batch, height * width, heads, dim) to the same; dim is a multiple of 4.

    Source: RoPE (Su et al. 2021, arXiv 2104.09864) in two dimensions, as MALA (Fan et al. 2025, arXiv 2507.00698) and
    RALA (Fan et al. 2024, arXiv 2411.07635) compute it.
    """

    def forward(self, q: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        turns = _turns(q, height, width)
        return _turn(q, turns), _turn(k, turns)
