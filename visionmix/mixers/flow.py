"""Flow-attention: Flowformer's mixer."""

from typing import Any

import torch
from torch import Tensor

from visionmix.layers import at_least_float32
from visionmix.mixers.linear import averages, dot, key_levels
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


@register_mixer("flow")
class FlowAttention(Attention):
    """Linear attention as a flow from sources (values) to sinks (results), which is conserved on both sides.

    With q and k after a sigmoid, n tokens, sums over all tokens and ``a . b = (a + 1e-6) (b + 1e-6)^T + 1e-6``, per
    head:

        in_i   = q_i . sum_j k_j                         what flows into sink i
        out_j  = k_j . sum_i q_i                         what flows out of source j
        sink_i = q_i . sum_j k_j / out_j                 the former, if every source gives 1
        src_j  = k_j . sum_i q_i / in_i                  the latter, if every sink takes 1
        y_i    = sigmoid(sink_i) q_i / in_i sum_j k_j^T v_j n softmax_j(min(src_j, 1))

    projected as in `Attention`. The softmax makes sources compete; the sigmoid says how much a sink lets through. Time
    and memory are linear in the tokens; flows are computed in float32 at least.

    Shapes and errors are those of `Attention`.

    Source: Flowformer (Wu et al. 2022, arXiv 2202.06258).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        qkv_bias: Whether the projection to q, k and v has a bias.
    """

    def __init__(self, dim: int, num_heads: int = 3, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias, rotary=False, lepe=None, gate=False, **dd)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = torch.sigmoid(at_least_float32(qk)).chunk(2, dim=2)
        v, tokens = at_least_float32(v), v.shape[1]
        mean = k.mean(dim=1, keepdim=True)
        # Flows over the number of tokens.
        incoming = _flow(q, mean, 1e-6 / tokens)
        outgoing = _flow(k, q.mean(dim=1, keepdim=True), 1e-6 / tokens)
        sinks = _flow(q, (k / outgoing).mean(dim=1, keepdim=True), 1e-6)
        sources = _flow(k, (q / incoming).mean(dim=1, keepdim=True), 1e-6)
        competition = torch.softmax(sources.clamp(max=1.0), dim=1) * tokens
        return averages(q, k, v * competition, incoming, key_levels(mean, False)) * torch.sigmoid(sinks)


def _flow(x: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """Return the flow (batch, tokens, heads, 1) between x and the total of the other side (batch, 1, heads, dk)."""
    return dot(x + 1e-6, total + epsilon) + epsilon
