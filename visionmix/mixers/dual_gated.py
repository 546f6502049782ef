"""Dual-gated linear attention: HER-Seg's mixer."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.mixers.mila import TurnedLinearAttention
from visionmix.mixers.registry import register_mixer


@register_mixer("dual_gated")
class DualGatedLinearAttention(TurnedLinearAttention):
    """Linear attention whose values pass through a bottleneck, with a gate on its result.

        v = W_2 silu(W_1 x),    z = silu(W_z x),    q, k = elu(W_qk x) + 1

    and then in each head, over the n cells j of the map, with rot turning pairs of channels by row and column,

        a_i = rot(q_i) (1/n sum_j rot(k_j)^T v_j) / (q_i mean_j k_j^T + 1e-6)
        out = W_o ((a + depthwise3x3(v)) * z)

    q and k are turned over all channels at once, as in `MambaInspiredLinearAttention`. Feature maps, turns and
    normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: HER-Seg (Xu et al. 2025, arXiv 2504.06205), whose code turns by a table of the built, square size; here
    angles follow any map.

    Args:
        dim: Channels, a multiple of 4.
        num_heads: Heads; a divisor of `dim` that leaves each an even number of channels.
        reduction: Channels over those between W_1 and W_2.
        qk_bias: Whether the projection to q and k has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `dim` or the heads' width is not as above, or `reduction` leaves
            no channels.
    """

    def __init__(self, dim: int, num_heads: int = 3, reduction: int = 4, qk_bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, num_heads, qk_bias, **dd)
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction={reduction} leaves no channels of dim={dim}; give 1 to {dim}")
        self.value_down = nn.Linear(dim, dim // reduction, **dd)
        self.value_up = nn.Linear(dim // reduction, dim, **dd)
        self.gate = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        v = self.value_up(F.silu(self.value_down(x)))
        out = self.attend(x.flatten(1, 2), v.flatten(1, 2), height, width)
        return self.close(out, v.permute(0, 3, 1, 2), F.silu(self.gate(x)))
