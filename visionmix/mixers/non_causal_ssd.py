"""State-space duality without an order: VSSD's mixer."""

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import ScanLayerNorm, at_least_float32, scan_sizes
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads

_STEP_RANGE = (1e-3, 0.1)
_RATE_RANGE = (1.0, 16.0)


@torch.fx.wrap
def _weights(steps: Tensor, bias: Tensor, logarithms: Tensor) -> Tensor:
    """Return ``softplus(steps + bias) * exp(logarithms)``, in float32 at least."""
    return F.softplus(at_least_float32(steps) + bias) * torch.exp(at_least_float32(logarithms))


@torch.fx.wrap
def _unit(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` (batch, rows, columns), where `like` is float16 over its largest number, and what it was divided by.

    The result of these products grows as the fourth power of the input, until the norm takes the scale away.
    """
    if like.dtype != torch.float16:
        return x, x.new_ones([1])
    level = x.detach().abs().amax(dim=[1, 2], keepdim=True).clamp(min=1e-30)
    return x / level, level


@register_mixer("non_causal_ssd")
class NonCausalSSD(nn.Module):
    """A state that is the sum over all tokens, weighted by their steps, and that every token reads: matrix products.

    With ``z, u, dt = W_in x`` and ``x, B, C = silu(depthwise3x3(u))`` the heads, each of a part of the channels of x,
    share B and C, and head i of n tokens computes:

        w_t = softplus(dt_t + b_i) exp(A_log_i)
        h   = sum over t of w_t B_t x_t^T
        y_t = C_t h + D_i x_t
        out = W_out (norm(y) * z)                  (norm over all heads; z has no activation)

    ``A_log`` begins as the logarithm of a uniform number between 1 and 16, D as 1, and b so that the steps begin
    log-uniform between 0.001 and 0.1; optimisers do not decay these three.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: VSSD (Shi et al. 2024, arXiv 2407.18559), from Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of ``expand * dim``.
        expand: Channels of the state over `dim`.
        d_state: States per channel.
        norm_eps: Epsilon of the norm.

    Raises:
        ValueError: `expand` leaves no channel, `num_heads` does not divide their number, or `d_state` is below 1.
    """

    undecayed = ("A_log", "D", "delta_bias")

    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        expand: float = 2.0,
        d_state: int = 64,
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        inner, _ = scan_sizes(dim, expand, None)
        check_heads(inner, num_heads)
        if d_state < 1:
            raise ValueError(f"d_state={d_state} is too small; give 1 or more")
        self.widths = [inner, inner + 2 * d_state, num_heads]
        self.conv_widths = [inner, d_state, d_state]
        self.head_dim = inner // num_heads
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False, **dd)
        self.conv = nn.Conv2d(self.widths[1], self.widths[1], 3, padding=1, groups=self.widths[1], **dd)
        self.act = nn.SiLU()
        self.delta_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Initialise the rates, the steps and the skips."""
        with torch.no_grad():
            low, high = (math.log(step) for step in _STEP_RANGE)
            step = torch.empty_like(self.delta_bias, dtype=torch.float32).uniform_(low, high).exp()
            self.delta_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*_RATE_RANGE).log())
            self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        z, x, steps = self.in_proj(x).split(self.widths, dim=-1)
        x = self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        x, B, C = x.split(self.conv_widths, dim=-1)
        y = self._read(x, B, C, _weights(steps.flatten(1, 2), self.delta_bias, self.A_log))
        return self.proj(self.norm(y).to(z.dtype).unflatten(1, (height, width)) * z)

    def _read(self, x: Tensor, B: Tensor, C: Tensor, weights: Tensor) -> Tensor:
        """Return ``C h + D x`` (batch, tokens, channels of all heads), in float32 at least."""
        tokens, half = x.shape[1], x
        x, B, C = at_least_float32(x), at_least_float32(B), at_least_float32(C)
        heads = x.unflatten(-1, (-1, self.head_dim))
        # Heads share B and C, so that the states of all are one matrix.
        weighted, level = _unit((heads * (weights / tokens).unsqueeze(-1)).flatten(2), half)
        (B, level_B), (C, level_C) = _unit(B, half), _unit(C, half)
        state, level_state = _unit((B.transpose(1, 2) @ weighted).to(x.dtype), half)
        skip = (heads * at_least_float32(self.D).unsqueeze(-1)).flatten(2)
        return torch.addcmul(skip, (C @ state).to(x.dtype), tokens * level * level_B * level_state * level_C)
