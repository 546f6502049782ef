"""Bidirectional gated linear attention with a local branch: ViG's mixer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.kernels.gated_linear_attention import bidirectional_op
from visionmix.layers import LogSigmoid, RmsNorm, ScanRmsNorm, scan_dtype
from visionmix.layers.order import sequence_order, take, token_order
from visionmix.mixers.registry import register_mixer


@register_mixer("gated_linear_attention")
class GatedLinearAttention(nn.Module):
    """Gated linear attention over the tokens in both directions, mixed with a depthwise convolution of them.

    With ``y = depthwise3x3(x)`` and, per head, ``q, k, v = W y``:

        forward_t  = scale * q_t S_t,  S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t    (backward likewise, from the end)
        g          = logsigmoid(W_2 W_1 y + b) / gate_divisor             (one gate per direction and key channel)
        o          = sigmoid(W_g y + b_g)
        out        = W_o act(rms(mean(forward, backward)) * o + rms(y) * (1 - o))

    The tokens are read in row-major order, or another scan order, in both directions; each token counts in both.
    ``scale = dk^-0.5``.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: ViG (Liao et al. 2024, arXiv 2405.18425); the recurrence is GLA's (Yang et al. 2023, arXiv 2312.06635).

    Args:
        dim: Channels.
        num_heads: Number of heads; a divisor of the key and value widths.
        key_ratio: Width of q and k over `dim`.
        gate_rank: Rank of the gate's projection.
        gate_divisor: Divisor of the gates' logarithms, by which a state outlives many tokens.
        conv_act: Whether SiLU follows the depthwise convolution.
        out_act: Whether SiLU comes before the output projection.
        eval_scale: Factor on the merged directions in eval mode only. The published plain ViG halves twice there, once
            in its kernel and once outside, so its weights are evaluated with 0.5; only the norm's epsilon sees it.
        order: The scan order in which the tokens are read; see `visionmix.scans`. A padded step of an order is a token
            of zeros.
        norm_eps: Epsilon of both RMS norms.

    Raises:
        ValueError: `num_heads` does not divide `dim` or the key width, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        key_ratio: float = 0.5,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        conv_act: bool = False,
        out_act: bool = False,
        eval_scale: float = 1.0,
        order: str = "raster",
        norm_eps: float = 1e-6,
        **dd: Any,
    ) -> None:
        super().__init__()
        key_dim = int(dim * key_ratio)
        if num_heads < 1 or dim % num_heads or key_dim < 1 or key_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide dim={dim} and the key width {key_dim} (key_ratio={key_ratio}); "
                "give a divisor of both"
            )
        self.order = sequence_order(order)
        self.in_raster = self.order == "raster"
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.head_key_dim = key_dim // num_heads
        self.head_value_dim = dim // num_heads
        self.dim = dim
        self.gate_divisor = gate_divisor
        self.eval_scale = eval_scale

        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd)
        self.conv_act = nn.SiLU() if conv_act else nn.Identity()
        self.qkv = nn.Linear(dim, 2 * key_dim + dim, bias=False, **dd)
        self.gate_down = nn.Linear(dim, gate_rank, bias=False, **dd)
        self.gate_up = nn.Linear(gate_rank, 2 * key_dim, **dd)
        self.log_sigmoid = LogSigmoid()
        self.out_gate = nn.Linear(dim, dim, **dd)
        self.global_norm = ScanRmsNorm(self.head_value_dim, eps=norm_eps, **dd)
        self.local_norm = RmsNorm(self.head_value_dim, eps=norm_eps, **dd)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        local = self.conv_act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).reshape(batch, height * width, dim)
        if self.in_raster:
            merged = self._attend(local)
        else:
            index, inverse = token_order(self.order, height, width, torch.jit.annotate(list[int], []), x)
            merged = take(self._attend(take(local, index)).flatten(2), inverse).unflatten(-1, (self.num_heads, -1))
        gate = self.out_gate(local).sigmoid_().unflatten(-1, (self.num_heads, self.head_value_dim))
        local = self.local_norm(local.unflatten(-1, (self.num_heads, self.head_value_dim)))
        out = torch.lerp(local, self.global_norm(merged).to(local.dtype), gate.to(local.dtype))
        return self.proj(self.out_act(out.flatten(2))).reshape(batch, height, width, dim)

    def _attend(self, local: Tensor) -> Tensor:
        """Return the directions' mean (batch, tokens, heads, value channels) over `local` (batch, tokens, dim)."""
        q, k, v = self.qkv(local).split([self.key_dim, self.key_dim, self.dim], dim=-1)
        # In place on the logarithms, which no gradient needs.
        gates = self.log_sigmoid(self.gate_up(self.gate_down(local))).div_(self.gate_divisor)
        gate_forward, gate_backward = gates.unflatten(-1, (2 * self.num_heads, self.head_key_dim)).chunk(2, dim=2)
        scale = self.head_key_dim**-0.5
        if not self.training:
            scale = scale * self.eval_scale
        return bidirectional_op(
            q.unflatten(-1, (self.num_heads, self.head_key_dim)),
            k.unflatten(-1, (self.num_heads, self.head_key_dim)),
            v.unflatten(-1, (self.num_heads, self.head_value_dim)),
            gate_forward,
            gate_backward,
            scale,
            "mean",
            scan_dtype(v),
        )
