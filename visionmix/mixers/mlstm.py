"""The matrix LSTM along rows: Vision-LSTM's mixer."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.mlstm import mlstm_op
from visionmix.layers import scaled_gate, unscaled, zero_token
from visionmix.mixers.registry import register_mixer


class _BlockLinear(nn.Module):
    """A linear map of each group of `size` channels by itself: a weight (groups, out, in), a bias."""

    def __init__(self, dim: int, size: int, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // size, size, size, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        groups, size, _ = self.weight.shape
        y = torch.einsum("bngi,goi->bngo", x.unflatten(2, (groups, size)), self.weight)
        return y.flatten(2) + self.bias


class _HeadNorm(nn.Module):
    """A layer norm of each head, ``(1 + weight) * y + bias``: (batch, tokens, heads, head_dim) to (..., dim).

    It computes in the type that a scan's result has and returns that of the parameters.
    """

    def __init__(self, dim: int, eps: float, **dd: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, [x.shape[-1]], None, None, self.eps).flatten(2)
        return torch.addcmul(self.bias.to(y.dtype), y, (1 + self.weight).to(y.dtype)).to(self.weight.dtype)


@register_mixer("mlstm")
class MatrixLSTM(nn.Module):
    """A matrix LSTM from the first cell to the last in row-major order, with a convolution before it and a gate behind.

    With ``u, z = W_in x``, ``c = silu(depthwise(u))`` and the cell of `visionmix.kernels.mlstm`:

        q, k = W_q c, W_k c,  v = W_v u    (block-diagonal, block_size channels a block)
        h    = mlstm(q, k, v, W_i [q, k, v] + b_i, W_f [q, k, v] + b_f)      (one gate per head and token)
        out  = W_out ((norm(h) + skip * c) * silu(z))

    where norm is a layer norm of each head. The forget gates begin between sigmoid(3) and sigmoid(6).

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Vision-LSTM (Alkin et al. 2024, arXiv 2406.04303), its second version; the cell is xLSTM's (Beck et al.
    2024, arXiv 2405.04517).

    Args:
        dim: Channels.
        num_heads: Heads of the cell; a divisor of its channels.
        expand: Channels of the cell over `dim`.
        block_size: Channels of a block of the projections to q, k and v; a divisor of the cell's channels.
        d_conv: Rows and columns of the depthwise convolution, an odd number.
        reverse: Whether the map is turned by 180 degrees before all else and back at the end: from the last cell to the
            first, with the convolution's kernel turned as well.
        norm_eps: Epsilon of the norm of heads.

    Raises:
        ValueError: `num_heads` or `block_size` does not divide the cell's channels, or `d_conv` is even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        expand: float = 2.0,
        block_size: int = 4,
        d_conv: int = 3,
        reverse: bool = False,
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        inner = int(dim * expand)
        for name, value in (("num_heads", num_heads), ("block_size", block_size)):
            if value < 1 or inner < 1 or inner % value:
                raise ValueError(f"{name}={value} does not divide {inner} channels (expand={expand} times dim={dim})")
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv={d_conv} is even; give an odd number, so that a window has a middle")
        self.num_heads = num_heads
        self.reverse = reverse
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, **dd)
        self.act = nn.SiLU()
        self.q_proj = _BlockLinear(inner, block_size, **dd)
        self.k_proj = _BlockLinear(inner, block_size, **dd)
        self.v_proj = _BlockLinear(inner, block_size, **dd)
        self.input_gate = nn.Linear(3 * inner, num_heads, **dd)
        self.forget_gate = nn.Linear(3 * inner, num_heads, **dd)
        self.norm = _HeadNorm(inner, norm_eps, **dd)
        self.skip = nn.Parameter(torch.ones(inner, **dd))
        self.proj = nn.Linear(inner, dim, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the weights as Vision-LSTM's code does."""
        dim = self.in_proj.in_features
        for layer in (self.in_proj, self.q_proj, self.k_proj, self.v_proj):
            trunc_normal_(layer.weight, std=(2 / (5 * dim)) ** 0.5)
            nn.init.zeros_(layer.bias)
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        trunc_normal_(self.input_gate.bias, std=0.1)
        with torch.no_grad():
            self.forget_gate.bias.copy_(torch.linspace(3, 6, self.num_heads))
        trunc_normal_(self.proj.weight, std=2 / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.reverse:
            x = x.flip([1, 2])
        u, z = self.in_proj(x).chunk(2, dim=-1)
        c = self.act(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u.flatten(1, 2))
        qkv = torch.cat([q, k, v], dim=-1)
        heads = (self.num_heads, -1)
        h = mlstm_op(
            q.unflatten(2, heads),
            k.unflatten(2, heads),
            v.unflatten(2, heads),
            self.input_gate(qkv),
            self.forget_gate(qkv),
        )
        y, scale = scaled_gate(torch.addcmul(self.norm(h), self.skip, c), self.act(z).flatten(1, 2))
        y = unscaled(self.proj(y), scale, self.proj(zero_token(y))).unflatten(1, (x.shape[1], x.shape[2]))
        return y.flip([1, 2]) if self.reverse else y
