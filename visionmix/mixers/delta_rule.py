"""Linear attention that corrects what its state holds, gated or not, in any scan order: DeltaNet's mixer."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.delta_rule import gated_delta_rule_op
from visionmix.layers import LogSigmoid, OrderedMixer, ScanRmsNorm, at_least_float32, scaled_gate, unscaled
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@register_mixer("gated_delta_rule")
class GatedDeltaRule(OrderedMixer):
    """Linear attention whose state replaces the value of a key, from both ends of the sequence.

    With ``q, k, v = W x`` per head, q and k after a SiLU and of length 1, and from each end with gates of its own

        beta, a = sigmoid(W_b x), sigmoid(W_a x + b_a)    (a is 1 without gate)
        S_t = a_t S_(t-1) + beta_t k_t^T (v_t - a_t k_t S_(t-1))
        y_t = head_dim^-0.5 q_t S_t

    the result is ``out = W_o (rms_norm(y_forward + y_backward) * silu(W_z x))``, with a norm of each head. Decays begin
    near 1. The recurrence runs in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells keep their places in the sequence.

    Source: Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464); without `gate`, DeltaNet (Schlag et al. 2021, arXiv
    2102.11174; Yang et al. 2024, arXiv 2406.06484). Theirs are causal, with convolutions before q, k and v, and a decay
    with a step size as in Mamba. The second direction is what maps need; with ``bidirectional=False`` there is one.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        gate: Whether states decay.
        bidirectional: Whether the sequence is read from both ends.
        order: The scan order in which the tokens are read; see `visionmix.scans`. A padded step of an order is a token
            of zeros.
        norm_eps: Epsilon of the norm.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or there is no such `order`, or it joins several.
    """

    has_gate: Final[bool]
    bidirectional: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        gate: bool = True,
        bidirectional: bool = True,
        order: str = "raster",
        norm_eps: float = 1e-6,
        **dd: Any,
    ) -> None:
        super().__init__(order)
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.has_gate = gate
        self.bidirectional = bidirectional
        directions = 2 if bidirectional else 1
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.beta = nn.Linear(dim, directions * num_heads, bias=False, **dd)
        if gate:
            self.decay = nn.Linear(dim, directions * num_heads, **dd)
            self.log_sigmoid = LogSigmoid()
        self.out_gate = nn.Linear(dim, dim, bias=False, **dd)
        self.act = nn.SiLU()
        self.norm = ScanRmsNorm(dim // num_heads, eps=norm_eps, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Give decays a bias under which a state halves in about 40 to 400 tokens, head by head."""
        if self.has_gate:
            with torch.no_grad():
                halves = self.decay.bias.unflatten(0, (-1, self.num_heads))
                halves.copy_(torch.linspace(4.0, 6.4, self.num_heads).expand_as(halves))

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed tokens of x, both (batch, steps, dim) in the order."""
        y = self._attend(x)
        gate = self.act(self.out_gate(x))
        y, scale = scaled_gate(self.norm(y).flatten(2), gate)
        return unscaled(self.proj(y), scale)

    def _attend(self, x: Tensor) -> Tensor:
        """Return the directions' sum (batch, tokens, heads, head_dim) over a sequence."""
        q, k, v = at_least_float32(self.qkv(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        beta = torch.sigmoid(at_least_float32(self.beta(x)))
        decay = self.log_sigmoid(at_least_float32(self.decay(x))) if self.has_gate else torch.zeros_like(beta)
        if not self.bidirectional:
            return gated_delta_rule_op(q, k, v, decay, beta, self.scale)
        betas, decays = beta.chunk(2, dim=-1), decay.chunk(2, dim=-1)
        y = gated_delta_rule_op(q, k, v, decays[0], betas[0], self.scale)
        back = gated_delta_rule_op(q.flip(1), k.flip(1), v.flip(1), decays[1].flip(1), betas[1].flip(1), self.scale)
        return y + back.flip(1)
