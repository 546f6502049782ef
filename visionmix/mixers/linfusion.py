"""Linear attention of inputs that a small network has prepared: LinFusion's mixer."""

from typing import Any

from torch import Tensor, nn

from visionmix.layers import Grid, SequenceMixer, at_least_float32
from visionmix.mixers.feature_maps import elu_plus_one
from visionmix.mixers.linear import averages, dot, key_levels
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@register_mixer("generalized_linear")
class GeneralizedLinearAttention(SequenceMixer):
    """Non-causal linear attention, normalised, whose queries and keys come from the input plus a function of it.

    With ``f(x) = W_2 leaky_relu(layer_norm(W_1 x + b_1)) + b_2``, one for queries and another for keys, per head:

        q, k = elu(W_q (x + f_q(x))) + 1, elu(W_k (x + f_k(x))) + 1,   v = W_v x
        y_i  = q_i (sum_j k_j^T v_j / n) / (q_i mean_j k_j^T + 1e-4)
        out  = W_o y + b_o

    over the n tokens j. It stands for the softmax attention of a trained model, whose projections it keeps. Feature
    maps and normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim).

    Source: LinFusion (Liu et al. 2024, arXiv 2409.02097).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        hidden_dim: Channels of f's hidden layer; None for `dim`.
        qkv_bias: Whether the projections to q, k and v have biases.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `hidden_dim` is below 1.
    """

    def __init__(
        self, dim: int, num_heads: int = 3, hidden_dim: int | None = None, qkv_bias: bool = False, **dd: Any
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if hidden_dim is not None and hidden_dim < 1:
            raise ValueError(f"hidden_dim={hidden_dim} is too small; give 1 or more, or None for dim={dim}")
        self.num_heads = num_heads
        hidden = dim if hidden_dim is None else hidden_dim

        def prepare() -> nn.Sequential:
            first, second = nn.Linear(dim, hidden, **dd), nn.Linear(hidden, dim, **dd)
            return nn.Sequential(first, nn.LayerNorm(hidden, **dd), nn.LeakyReLU(), second)

        self.prepare_q, self.prepare_k = prepare(), prepare()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias, **dd) for _ in range(3))
        self.proj = nn.Linear(dim, dim, **dd)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        q = elu_plus_one(self._heads(self.q(x + self.prepare_q(x))))
        k = elu_plus_one(self._heads(self.k(x + self.prepare_k(x))))
        v = self.v(x)
        mean = k.mean(dim=1, keepdim=True)
        out = averages(q, k, self._heads(v), dot(q, mean) + 1e-4, key_levels(mean, False))
        return self.proj(out.flatten(2).to(v.dtype))

    def _heads(self, x: Tensor) -> Tensor:
        """Return x (batch, tokens, dim) as (batch, tokens, heads, head_dim), in float32 at least."""
        return at_least_float32(x).unflatten(-1, (self.num_heads, -1))
