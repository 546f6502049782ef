"""What mixers of token sequences share."""

from typing import Any

from torch import Tensor, nn

from visionmix.layers.grid import Grid


class SequenceMixer(nn.Module):
    """A mixer of maps that is given by what it does to sequences: a subclass has ``forward_tokens(x, grid)``."""

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tokens = x.reshape(batch, height * width, dim)
        return self.forward_tokens(tokens, Grid(height, width, [], None)).reshape(batch, height, width, dim)


class GatedMixer(SequenceMixer):
    """A sequence mixer with Mamba's projections: `in_proj` to values and gates, `act` of the gates, `proj` back.

    Args:
        dim: Channels.
        inner: Channels of the values, and of the gates.
    """

    def __init__(self, dim: int, inner: int, **dd: Any) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.act = nn.SiLU()
        self.proj = nn.Linear(inner, dim, bias=False, **dd)
