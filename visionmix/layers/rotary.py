"""Rotary position encodings of maps."""

from functools import lru_cache

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.graphs import may_keep


def _turns(
    height: int, width: int, count: int, endpoint: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, both (height * width, 2 * count), of the angles to turn pairs of channels by."""
    if endpoint:
        frequencies = (1.0 / (10000 ** torch.linspace(0, 1, count, dtype=torch.float32, device=device))).to(dtype)
    else:
        frequencies = 1.0 / (10000 ** (torch.arange(count, device=device).to(dtype) / count))
    rows = torch.arange(height, device=device).to(dtype)[:, None, None] * frequencies
    columns = torch.arange(width, device=device).to(dtype)[None, :, None] * frequencies
    angles = torch.cat([rows.expand(height, width, count), columns.expand(height, width, count)], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=8)
def _complex_turns(height: int, width: int, count: int, endpoint: bool, dtype: torch.dtype) -> Tensor:
    """Return cosine + i sine on the CPU, (height * width, 1, 2 * count): for every token, for all heads."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.complex(*_turns(height, width, count, endpoint, dtype, torch.device("cpu"))).unsqueeze(1)


def _takes_kept_turns(x: Tensor) -> bool:
    """Return whether turns may be kept for `x`, and its neighbouring channels are pairs in memory."""
    if not may_keep(x):
        return False
    return x.stride(-1) == 1 and not any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1]))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return x (..., dim), channels 2i and 2i + 1 turned by the angle of cosine and sine i, both (..., dim / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)


@torch.fx.wrap
def _turn(x: Tensor, height: int, width: int, endpoint: bool) -> Tensor:
    """Return x (batch, tokens, heads, dim), channels 2i and 2i + 1 of each token turned by its angle i."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[-1] // 4
    if not torch.jit.is_scripting():
        if _takes_kept_turns(x):
            # One product of complex numbers, a pass over memory instead of ten: Inductor would not fuse it.
            pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * _complex_turns(height, width, count, endpoint, dtype)).flatten(-2)
    cosine, sine = _turns(height, width, count, endpoint, dtype, x.device)
    return turned(x, cosine.unsqueeze(1), sine.unsqueeze(1))


class RotaryMap(nn.Module):
    """Rotary position encodings of a map: pairs of neighbouring channels turned by row and column.

    The first dim / 4 pairs turn by the row, the others by the column, pair i by ``10000^(-i / (dim / 4 - 1))`` radians
    a row or column: the last frequency is 1 / 10000 itself, as MALA's and RALA's models have it. RoPE's would only
    approach it: without `endpoint` they are ``10000^(-i / (dim / 4))``. Computed in float32 at least. On the CPU the
    cosines and sines of the last sizes are kept, for all blocks.

    Shapes: (batch, height * width, heads, dim) to the same; dim is a multiple of 4. The heads of q and of k, side by
    side, are turned in one call.

    Source: RoPE (Su et al. 2021, arXiv 2104.09864) in two dimensions, as MALA (Fan et al. 2025, arXiv 2507.00698) and
    RALA (Fan et al. 2024, arXiv 2411.07635) compute it; without `endpoint`, MILA (Han et al. 2024, arXiv 2405.16605).

    Args:
        endpoint: Whether the last frequency is 1 / 10000.
    """

    def __init__(self, endpoint: bool = True) -> None:
        super().__init__()
        self.endpoint = endpoint

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return _turn(x, height, width, self.endpoint)
