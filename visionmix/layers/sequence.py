"""What mixers of token sequences share."""

from typing import Any

from torch import Tensor, nn

from visionmix.layers.grid import Grid
from visionmix.layers.order import sequence_order, take, token_order
from visionmix.layers.selective_scan import SelectiveScan1d, scan_sizes


class SequenceMixer(nn.Module):
    """A mixer of maps that is given by what it does to sequences: a subclass has ``forward_tokens(x, grid)``."""

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tokens = x.reshape(batch, height * width, dim)
        return self.forward_tokens(tokens, Grid(height, width, [], None)).reshape(batch, height, width, dim)


class OrderedMixer(SequenceMixer):
    """A sequence mixer that reads its tokens in a scan order: a subclass has ``mix(x)``.

    A padded step of an order is a token of zeros. Tokens that are not cells keep their places in the sequence.

    Args:
        order: The scan order; see `visionmix.scans`.

    Raises:
        ValueError: there is no such `order`, or it joins several.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = sequence_order(order)
        self.in_raster = self.order == "raster"

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed tokens of x, both (batch, steps, dim) in the order."""
        raise NotImplementedError

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        if self.in_raster:
            return self.mix(x)
        index, inverse = token_order(self.order, grid.height, grid.width, grid.prefix_positions, x)
        return take(self.mix(take(x, index)), inverse)


class ScanMixer(nn.Module):
    """The frame of mixers around selective scans: `in_proj` to values and gates, `act` of the gates, `proj` back.

    Args:
        dim: Channels.
        expand: Channels of the scans over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projections; None for ``ceil(dim / 16)``.

    Attributes:
        inner: Channels of the scans.
        sizes: `dt_rank` and `d_state`, as the scans take them.

    Raises:
        ValueError: `expand` leaves no channel.
    """

    has_bias = False  # of the projections

    def __init__(self, dim: int, expand: float = 2.0, d_state: int = 16, dt_rank: int | None = None, **dd: Any) -> None:
        super().__init__()
        self.inner, rank = scan_sizes(dim, expand, dt_rank)
        self.sizes = {"dt_rank": rank, "d_state": d_state}
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=self.has_bias, **dd)
        self.act = nn.SiLU()
        self.proj = nn.Linear(self.inner, dim, bias=self.has_bias, **dd)

    def factory_kwargs(self) -> dict[str, Any]:
        """Return the `device` and the `dtype` that were asked for, for a subclass's own layers."""
        return {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}


class GatedMixer(ScanMixer, SequenceMixer):
    """A sequence mixer around Mamba's convolutions and scans, `visionmix.layers.SelectiveScan1d`.

    Args:
        dim: Channels.
        d_conv: Tokens that the causal convolutions see.
        **options: `expand`, `d_state` and `dt_rank` of `ScanMixer`.

    Raises:
        ValueError: `expand` leaves no channel.
    """

    def __init__(self, dim: int, *, d_conv: int = 4, **options: Any) -> None:
        super().__init__(dim, **options)
        self.sizes["d_conv"] = d_conv

    def new_scan(self) -> SelectiveScan1d:
        """Return a convolution and scan of the values, with parameters of their own."""
        return SelectiveScan1d(self.inner, **self.sizes, **self.factory_kwargs())
