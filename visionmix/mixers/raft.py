"""Raft token mixing: an MLP along the rows or the columns of a map, for a few groups of channels at once."""

from typing import Any, Final

from torch import Tensor, nn

from visionmix.layers import mlp, resample_map
from visionmix.mixers.registry import register_mixer

_AXES = ("vertical", "horizontal")


@register_mixer("raft")
class RaftMixing(nn.Module):
    """One MLP for all columns (or rows) and all rafts, where a raft is `raft_size` channels, one of each channel group.

    With the channels as (raft_size, dim / raft_size) and the map X at the built size,

        u_wc = (X[h, w, r, c] for all r and h),  v_wc = W_2 gelu(W_1 u_wc + b_1) + b_2

    and v_wc takes the place of u_wc. With `axis` "horizontal", rows and columns change places. A map of another size is
    resampled to the built one, and the result is resampled back (bicubic).

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: RaftMLP (Tatsunami and Taki 2021, arXiv 2108.04384).

    Args:
        dim: Channels.
        axis: Which cells are mixed: "vertical" for those of a column, "horizontal" for those of a row.
        grid_size: Rows and columns of the built map. The weights belong to this size and cannot be resampled to
            another, so setting a model's input size does not change it.
        raft_size: Channels that are mixed together; a divisor of `dim`.
        mlp_ratio: Hidden width over ``raft_size`` times the rows (or columns).

    Raises:
        ValueError: `axis` is unknown, or `raft_size` does not divide `dim`.
    """

    vertical: Final[bool]

    def __init__(
        self,
        dim: int,
        axis: str = "vertical",
        grid_size: tuple[int, int] = (14, 14),
        raft_size: int = 2,
        mlp_ratio: float = 2.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if axis not in _AXES:
            raise ValueError(f"axis={axis!r} is unknown; give one of {', '.join(map(repr, _AXES))}")
        if raft_size < 1 or dim % raft_size:
            raise ValueError(f"raft_size={raft_size} does not divide dim={dim}; give a divisor, or 1")
        self.vertical = axis == "vertical"
        self.rows, self.columns = grid_size
        self.raft_size = raft_size
        self.side = self.rows if self.vertical else self.columns
        self.mlp = mlp(raft_size * self.side, mlp_ratio=mlp_ratio, **dd)

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed map of one of the built size, (batch, rows, columns, dim)."""
        if self.vertical:
            x = x.transpose(1, 2)
        # (batch, others, side, raft, channel) to (batch, others, channel, raft, side), and back.
        x = x.unflatten(3, (self.raft_size, -1)).permute(0, 1, 4, 3, 2)
        x = self.mlp(x.flatten(3)).unflatten(3, (self.raft_size, self.side)).permute(0, 1, 4, 3, 2).flatten(3)
        return x.transpose(1, 2) if self.vertical else x

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        return resample_map(self.mix(resample_map(x, self.rows, self.columns)), height, width)
