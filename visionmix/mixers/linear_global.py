"""Linear global attention: L2ViT's mixer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import at_least_float32
from visionmix.mixers.linear import averages, dot
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


@register_mixer("linear_global")
class LinearGlobalAttention(Attention):
    """Linear attention whose normalisers are clamped from below, with a learned scale for each head.

    With ``q, k, v = W x``, in each head of scale s, over all tokens j,

        y_i = s relu(q_i) (sum_j relu(k_j)^T v_j) / max(relu(q_i) sum_j relu(k_j)^T, floor)

    projected as in `Attention`. Time and memory are linear in the tokens. Feature maps and normalisers are computed in
    float32 at least.

    Shapes and errors are those of `Attention`; ValueError also for a `floor` that is not positive.

    Source: L2ViT (Zheng 2025, arXiv 2501.16182).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        floor: The least normaliser.
        qkv_bias: Whether the projection to q, k and v has a bias.
    """

    def __init__(self, dim: int, num_heads: int = 3, floor: float = 100.0, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias, rotary=False, lepe=None, gate=False, **dd)
        if not floor > 0:
            raise ValueError(f"floor={floor} lets normalisers be 0; give a positive number")
        self.floor = float(floor)
        self.head_scale = nn.Parameter(torch.empty(num_heads, 1, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the scales to head_dim^-0.5."""
        nn.init.constant_(self.head_scale, self.scale)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = F.relu(at_least_float32(qk)).chunk(2, dim=2)
        tokens, mean = k.shape[1], k.mean(dim=1, keepdim=True)
        normaliser = (dot(q, mean) * tokens).clamp_min(self.floor) / tokens
        # A channel whose keys are all 0 has no level, and nothing to divide.
        return averages(q, k, at_least_float32(v), normaliser, mean.detach().clamp_min(1e-30)) * self.head_scale
