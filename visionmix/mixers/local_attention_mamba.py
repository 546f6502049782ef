"""A selective scan for what is global, then window attention for what is local: LaMamba's mixer."""

from typing import Any

from torch import Tensor, nn

from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.window import WindowAttention


@register_mixer("local_attention_mamba")
class LocalAttentionMamba(nn.Module):
    """Selective scans along four snakes, then softmax attention in windows over what they add to the map.

    With the gated scans of `CrossScan` and the attention of `WindowAttention`:

        y   = scan(u)
        out = y + attention(norm(u + y))

    In the published block both parts are residual branches, each with a norm in front and with shift, scale and gate
    from the condition of the diffusion model. Here the norm in front of the first is the block's, so that ``u + y``
    stands where the published block adds y to the map before that norm; `scan`, `norm` and `attention` are the parts
    for a conditioned block.

    Shapes: (batch, height, width, dim) to the same, for every height and width. The published column scans are defined
    on square maps alone.

    Source: LaMamba-Diff (Fu et al. 2024, arXiv 2408.02615).

    Args:
        dim: Channels.
        num_heads: Heads of the attention; a divisor of `dim`.
        window_size: Rows and columns of a window.
        shift: Whether windows are shifted by half their size, as in every second published block.
        expand: Channels of the scans over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        order: A scan order, whose directions are the order, its transpose and the reverses of both, or one of
            `visionmix.scans.direction_sets()`.
        grid_size: Rows and columns of the built map; None for one that is larger than a window.
        norm_eps: Epsilon of both norms.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `expand` leaves no channel, `window_size`, `d_state` or `dt_rank`
            is below 1, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        window_size: int = 8,
        shift: bool = False,
        expand: float = 2.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        order: str = "lamamba",
        grid_size: tuple[int, int] | None = None,
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        scan = {"expand": expand, "d_state": d_state, "dt_rank": dt_rank, "order": order, "norm_eps": norm_eps}
        self.scan = CrossScan(dim, gate=True, **scan, **dd)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attention = WindowAttention(
            dim, num_heads=num_heads, window_size=window_size, shift=shift, grid_size=grid_size, **dd
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.scan(x)
        return y + self.attention(self.norm(x + y))
