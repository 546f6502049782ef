"""Gates: of recurrences, of channels, of what a projection takes."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.layers.norm import ScanLayerNorm
from visionmix.layers.precision import at_least_float32


@torch.fx.wrap
def _log_sigmoid(x: Tensor) -> Tensor:
    x = at_least_float32(x)
    return torch.where(x <= -20.0, x, torch.log(torch.sigmoid(x.clamp(min=-20.0))))


class LogSigmoid(nn.Module):
    """``log(sigmoid(x))``, element by element, in float32 at least; absolute error at most 1e-7 in float32.

    Below -20 it is x itself (off by exp(-20)); above, the logarithm of the sigmoid as it stands. PyTorch's own
    `logsigmoid` takes log1p, which is exact to the last digit near 0 and on a CPU took eight times as long.

    Shapes: any to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _log_sigmoid(x)


def gated(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x * gate`` in the type of `gate` for a linear projection, and what `projected` makes good behind it.

    In float16 each token (..., dim) is divided by a power of two, (..., 1), that brings it below 32768: what leaves a
    projection may be in range where what enters it is not. In any other type there is nothing to make good.
    """
    return _gated(x, gate)  # what torch.fx.wrap leaves whole it finds by the name in its own module alone


@torch.fx.wrap
def _gated(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if gate.dtype != torch.float16:
        return (x * gate).to(gate.dtype), gate.new_zeros([0, gate.shape[-1]])
    y = x.float() * gate.float()
    exponent = torch.log2(y.detach().abs().amax(dim=-1, keepdim=True) / 32768).ceil().clamp(min=0)
    scale = torch.exp2(exponent)
    return (y / scale).to(gate.dtype), scale


def zero_token(x: Tensor) -> Tensor:
    """Return a token of zeros (1, dim) for float16 tokens x (..., dim), none (0, dim) in any other type."""
    return _zero_token(x)


@torch.fx.wrap
def _zero_token(x: Tensor) -> Tensor:
    return x.new_zeros([int(x.dtype == torch.float16), x.shape[-1]])


def projected(out: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the projection of what `gated` was given, from that of what it returned.

    Args:
        out: The projection of its first result.
        scale: Its second result.
        bias: The projection of `zero_token`; None where the projection has no bias.
    """
    return _projected(out, scale, bias)


@torch.fx.wrap
def _projected(out: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if out.dtype != torch.float16:
        return out
    wide = out.float() * scale
    if bias is not None:
        wide = wide - bias.float() * (scale - 1.0)
    return wide.to(out.dtype)


class ChannelGate(nn.Module):
    """Every channel times a gate made from the mean over all cells: ``x * sigmoid(W_2 gelu(W_1 mean(norm(x))))``.

    Shapes: (batch, height, width, dim) to the same.

    Source: the BiAttn of LightViT (Huang et al. 2022, arXiv 2207.05557) without its spatial half, as EfficientVMamba
    (Pei et al. 2024, arXiv 2403.09977) and LocalMamba (Huang et al. 2024, arXiv 2403.09338) have it.

    Args:
        dim: Channels; the hidden layer has an eighth of them.
        norm_eps: Epsilon of the norm.
    """

    def __init__(self, dim: int, *, norm_eps: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        hidden = max(1, dim // 8)
        self.norm = ScanLayerNorm(dim, eps=norm_eps, **dd)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(x).mean(dim=[1, 2], keepdim=True)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(pooled))))
