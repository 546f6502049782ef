"""Linear attention whose decay is a sum and not a product: LightNet's mixer."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.gated_linear_attention import gated_linear_attention_op
from visionmix.layers import OrderedMixer, ScanRmsNorm, at_least_float32, scaled_gate, unscaled
from visionmix.mixers.registry import register_mixer


@register_mixer("lightnet")
class LightNetAttention(OrderedMixer):
    """Linear attention with weights of the keys that sum to 1, so that one pass over a map sees all of it.

    With ``q, k, v = silu(W_q x), W_k x, W_v x``, per head of dk key channels:

        y   = dk^-0.5 q (softmax(k)^T v)                               (the softmax is over all tokens)
        out = W_o (rms_norm(y) * silu(W_2 W_1 x))

    With `causal` sum and softmax run over the tokens up to one's own. That is a recurrence with an additive decay,

        S_t = c_(t-1) / c_t S_(t-1) + (exp(k_t) / c_t)^T v_t,  c_t = c_(t-1) + exp(k_t),  y_t = dk^-0.5 q_t S_t,

    which gated linear attention's kernels run. Softmax and sums are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim).

    Source: LightNet (Qin et al. 2024, arXiv 2405.21022). Its position encodings, MD-TPE and MD-LRPE, are not here,
    since backbones bring position embeddings.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim` and of the key width.
        key_ratio: Width of q and k over `dim`.
        gate_rank: Rank of the gate's projection.
        causal: Whether tokens see those before them alone.
        order: The scan order in which causal tokens are read; see `visionmix.scans`. A padded step of an order is a
            token of zeros.
        norm_eps: Epsilon of the norm.

    Raises:
        ValueError: `num_heads` does not divide `dim` or the key width, `gate_rank` is below 1, or there is no such
            `order`, or it joins several.
    """

    causal: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        key_ratio: float = 1.0,
        gate_rank: int = 16,
        causal: bool = False,
        order: str = "raster",
        norm_eps: float = 1e-6,
        **dd: Any,
    ) -> None:
        super().__init__(order)
        key_dim = int(dim * key_ratio)
        if num_heads < 1 or dim % num_heads or key_dim < 1 or key_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide dim={dim} and the key width {key_dim} (key_ratio={key_ratio}); "
                "give a divisor of both"
            )
        if gate_rank < 1:
            raise ValueError(f"gate_rank={gate_rank} is too small; give 1 or more")
        self.in_raster = self.in_raster or not causal  # what sees everything has no order
        self.causal = causal
        self.num_heads = num_heads
        self.scale = (key_dim // num_heads) ** -0.5
        self.parts = [key_dim, key_dim, dim]
        self.qkv = nn.Linear(dim, 2 * key_dim + dim, bias=False, **dd)
        self.gate_down = nn.Linear(dim, gate_rank, bias=False, **dd)
        self.gate_up = nn.Linear(gate_rank, dim, bias=False, **dd)
        self.act = nn.SiLU()
        self.norm = ScanRmsNorm(dim, eps=norm_eps, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed tokens of x, both (batch, steps, dim) in the order."""
        y = self._attend(x)
        gate = self.act(self.gate_up(self.gate_down(x)))
        y, scale = scaled_gate(self.norm(y), gate)
        return unscaled(self.proj(y), scale)

    def _attend(self, x: Tensor) -> Tensor:
        """Return the attended values (batch, tokens, dim) of a sequence."""
        q, k, v = at_least_float32(self.qkv(x)).split(self.parts, dim=-1)
        q, k, v = self._heads(F.silu(q)), self._heads(k), self._heads(v)
        if self.causal:
            total = torch.logcumsumexp(k, dim=1)
            decay = F.pad(total[:, :-1] - total[:, 1:], [0, 0, 0, 0, 1, 0])
            y, _ = gated_linear_attention_op(q, torch.exp(k - total), v, decay, self.scale, None, False)
            return y.flatten(2)
        state = torch.softmax(k, dim=1).permute(0, 2, 3, 1) @ v.transpose(1, 2)
        # Queries over their largest channel, so that autocast's products are no larger than the values.
        level = q.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        y = ((q / level).transpose(1, 2) @ state).transpose(1, 2)
        return (y * (level * self.scale)).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
