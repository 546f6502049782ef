"""Linear layers of shifts and additions: weights that are powers of two, and a choice between these and any weights."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.half_precision import at_least_float32


class ShiftLinear(nn.Module):
    """A linear layer whose weights are 0 or a power of two with a sign, so that products are shifts of bits.

        out = floor(x) W^T + floor(b),  W = round(sign) 2^round(clamp(shift, -14, 0))

    where ``floor`` is to multiples of 2^-16 and ``round(sign)`` is -1, 0 or 1. In the backward pass roundings are the
    identity, and the sign's gradient is that of the weight. It computes in float32 at least. The weights are
    multiplied as any others here: a shift is cheaper on hardware made for it.

    Shapes: (..., in_dim) to (..., out_dim).

    Source: DeepShift (Elhoushi et al. 2019, arXiv 1905.13298), as ShiftAddViT (You et al. 2023, arXiv 2306.06446)
    uses it.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        bias: Whether there is a bias.
    """

    undecayed = ("shift", "sign")

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, **dd: Any) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(out_dim, in_dim, **dd))
        self.sign = nn.Parameter(torch.empty(out_dim, in_dim, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd)) if bias else None
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw shifts from -14 to 0, signs from -1 to 1, and the bias as that of `torch.nn.Linear`, all uniformly."""
        nn.init.uniform_(self.shift, -14.0, 0.0)
        nn.init.uniform_(self.sign, -1.0, 1.0)
        if self.bias is not None:
            bound = self.shift.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        shift, sign = at_least_float32(self.shift), at_least_float32(self.sign)
        power = torch.exp2(shift + (shift.clamp(-14.0, 0.0).round() - shift).detach())
        rounded = sign.round().sign()
        weight = power * rounded.detach() + (sign - sign.detach())
        bias = None if self.bias is None else _fixed(at_least_float32(self.bias))
        return F.linear(_fixed(at_least_float32(x)), weight, bias).to(x.dtype)


def _fixed(x: Tensor) -> Tensor:
    """Return x as a multiple of 2^-16 between -2^15 and 2^15, rounded down; the gradient is that of the identity."""
    fixed = (torch.floor(x * 65536.0) / 65536.0).clamp(-32768.0, 32767.0)
    return x + (fixed - x).detach()


class PrimitiveMixture(nn.Module):
    """A linear layer for some tokens and a `ShiftLinear` for the others: each goes where its larger gate is.

        out = Linear(x) where (W_g x + b_g)_0 is the larger gate, ShiftLinear(x) elsewhere

    Both run on all tokens and one result is kept; a runtime for few multiplications would run one. The choice has the
    gradient of a softmax over both gates, so that training moves it.

    Shapes: (..., in_dim) to (..., out_dim).

    Source: the mixture of multiplication primitives of ShiftAddViT (You et al. 2023, arXiv 2306.06446). In its code the
    gate of largest value alone has no gradient, and another, noisy gate is trained by a loss of its own.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        bias: Whether both layers have biases.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, **dd: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(in_dim, 2, **dd)
        self.dense = nn.Linear(in_dim, out_dim, bias=bias, **dd)
        self.shifted = ShiftLinear(in_dim, out_dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        share = gate.softmax(dim=-1)
        # Two equal gates are a tie for the first, as in a sort.
        second = (gate[..., 1:] > gate[..., :1]).to(share.dtype)
        second = second + (share[..., 1:] - share[..., 1:].detach())
        dense = self.dense(x)
        return torch.lerp(dense, self.shifted(x).to(dense.dtype), second.to(dense.dtype))
