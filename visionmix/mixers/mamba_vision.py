"""A selective scan of half of the channels, beside the other half: MambaVision's mixer."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.layers import Grid, SelectiveScan2d, SequenceMixer, scaled, scan_sizes, unscaled
from visionmix.layers.order import sequence_order, take, token_order
from visionmix.mixers.registry import register_mixer


class _Scan(SelectiveScan2d):
    """`SelectiveScan2d` whose projections begin as every linear layer of the model, and its steps at softplus(0)."""

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        super().init_layer_weights()
        for weight in (self.x_proj.weight, self.delta_weight):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.delta_bias)


@register_mixer("mamba_vision")
class MambaVisionMixer(SequenceMixer):
    """A selective scan of half of the channels; the other half stands beside its result and gates nothing.

    With ``x, z = silu(conv(W_in u))``, where conv is a depthwise convolution along the sequence that sees the token
    before and the token after, without a bias, and the scan S of `visionmix.layers.SelectiveScan2d` in one direction:

        out = W_out [S(x), z]

    ``A_log`` and D begin as there; all projections, that of the steps included, as the model's linear layers, and
    the bias of the steps as 0, as the published code leaves them.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells (a class token) keep their places in the sequence.

    Source: MambaVision (Hatamizadeh and Kautz 2024, arXiv 2407.08083).

    Args:
        dim: Channels.
        expand: Channels of the scan over `dim`; as many stand beside it.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        order: The scan order of the cells. A padded step of an order is a token of zeros.
        bias_scale: Factor of the steps' bias. The published code adds it twice, once in the projection and once in the
            scan, so that published weights need 2.

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, or there is no such `order`, or it
            joins several.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 0.5,
        d_state: int = 8,
        dt_rank: int | None = None,
        order: str = "raster",
        bias_scale: float = 1.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        inner, rank = scan_sizes(dim, expand, dt_rank)
        self.order = sequence_order(order)
        self.in_raster = self.order == "raster"
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv2d(2 * inner, 2 * inner, (1, 3), padding=(0, 1), groups=2 * inner, bias=False, **dd)
        self.act = nn.SiLU()
        # Tokens in their order are a map of one row.
        self.scan = _Scan(inner, ["raster"], dt_rank=rank, d_state=d_state, bias_scale=bias_scale, **dd)
        self.proj = nn.Linear(2 * inner, dim, bias=False, **dd)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        if self.in_raster:
            return self._mix(x)
        index, inverse = token_order(self.order, grid.height, grid.width, grid.prefix_positions, x)
        return take(self._mix(take(x, index)), inverse)

    def _mix(self, x: Tensor) -> Tensor:
        # The sequences of a batch are the rows of one map. PyTorch chooses a convolution by the batch, so that a graph
        # would be compiled once more from 17 windows on.
        x = self.conv(self.in_proj(x).unsqueeze(0).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(0)
        x, z = self.act(x).chunk(2, dim=-1)
        y = self.scan(x.unsqueeze(1)).squeeze(1)
        y, scale = scaled(torch.cat([y, z.to(y.dtype)], dim=-1), z)
        return unscaled(self.proj(y), scale)
