"""Linear attention in Mamba's place, MILA's mixer, and what it shares with HER-Seg's."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import RotaryMap, at_least_float32, scaled_gate, unscaled, zero_token
from visionmix.mixers.linear import averages, dot, elu_plus_one, key_levels
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


class TurnedLinearAttention(nn.Module):
    """Linear attention whose queries and keys are turned over all channels at once, and its projection.

    The heads of the first half see rows, those of the second half see columns, and each head has frequencies of its
    own. A mixer calls `attend` and `close`.

    Args:
        dim: Channels, a multiple of 4.
        num_heads: Heads; a divisor of `dim` that leaves each an even number of channels.
        qk_bias: Whether the projection to q and k has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `dim` or the heads' width is not as above.
    """

    def __init__(self, dim: int, num_heads: int, qk_bias: bool, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if dim % 4 or dim // num_heads % 2:
            raise ValueError(
                f"dim={dim} and num_heads={num_heads} make heads of {dim // num_heads} channels; rows and columns turn "
                "pairs of them, so give a dim that is a multiple of 4 and heads with an even number of channels"
            )
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=qk_bias, **dd)
        self.rotary = RotaryMap(endpoint=False)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attend(self, x: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim) of v, with q and k made from x.

        Both are (batch, tokens, dim). In each head, over the n cells j of the map, with ``q, k = elu(W_qk x) + 1``,
        ``rot(q_i) (1/n sum_j rot(k_j)^T v_j) / (q_i mean_j k_j^T + 1e-6)``.
        """
        qk = elu_plus_one(at_least_float32(self.qk(x)))
        q, k = self._heads(qk)
        mean = k.mean(dim=1, keepdim=True)
        normaliser = dot(q, mean) + 1e-6
        q, k = self._heads(self.rotary(qk.unflatten(-1, (2, -1)), height, width).flatten(2))
        v = at_least_float32(v).unflatten(-1, (self.num_heads, -1))
        return averages(q, k, v, normaliser, key_levels(mean, True))

    def close(self, out: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Return ``W_o ((out + depthwise3x3(v)) * gate)``, (batch, height, width, dim).

        Args:
            out: What `attend` gave.
            v: The values as a map (batch, dim, height, width).
            gate: The gate (batch, height, width, dim).
        """
        out = out.flatten(2).unflatten(1, (v.shape[2], v.shape[3])).to(v.dtype)
        out, scale = scaled_gate(out + self.lepe(v).permute(0, 2, 3, 1), gate)
        return unscaled(self.proj(out), scale, self.proj(zero_token(out)))

    def _heads(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k (batch, tokens, heads, head_dim) of (batch, tokens, 2 * dim)."""
        q, k = qk.unflatten(-1, (2 * self.num_heads, -1)).chunk(2, dim=2)
        return q, k


@register_mixer("mila")
class MambaInspiredLinearAttention(TurnedLinearAttention):
    """Linear attention between Mamba's projections, convolution and gate.

        y, z = W_i x,    v = silu(depthwise3x3(y)),    q, k = elu(W_qk v) + 1

    and then in each head, over the n cells j of the map, with rot turning pairs of channels by row and column,

        a_i = rot(q_i) (1/n sum_j rot(k_j)^T v_j) / (q_i mean_j k_j^T + 1e-6)
        out = W_o ((a + depthwise3x3(v)) * silu(z))

    q and k are turned over all channels at once: the heads of the first half see rows, those of the second half see
    columns, and each head has frequencies of its own. Feature maps, turns and normalisers are computed in float32 at
    least.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: MILA (Han et al. 2024, arXiv 2405.16605), which its repository calls MLLA. Its classifier turns by a table
    of the built size and takes square images alone; here, as in its code for detection, angles follow any map.

    Args:
        dim: Channels, a multiple of 4.
        num_heads: Heads; a divisor of `dim` that leaves each an even number of channels.
        qk_bias: Whether the projection to q and k has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `dim` or the heads' width is not as above.
    """

    entry = "in_proj"

    def __init__(self, dim: int, num_heads: int = 3, qk_bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, num_heads, qk_bias, **dd)
        self.in_proj = nn.Linear(dim, 2 * dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        y, gate = self.in_proj(x).chunk(2, dim=-1)
        v = F.silu(self.conv(y.permute(0, 3, 1, 2)))
        tokens = v.permute(0, 2, 3, 1).flatten(1, 2)
        return self.close(self.attend(tokens, tokens, height, width), v, F.silu(gate))
