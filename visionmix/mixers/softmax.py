"""Softmax attention over all tokens: ViT's mixer, to which the others are compared."""

from typing import Any, Final

import torch
from timm.layers import LayerNorm, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import Grid, RotaryMap, scaled_gate, unscaled, zero_token
from visionmix.mixers.registry import register_mixer


class Attention(nn.Module):
    """Projections, position encodings and gate around an attention over all tokens, for mixers to fill in.

        q, k, v, o = W x
        out        = W_o ((attend(q, k, v) + depthwise(v)) * o)        (depthwise with `lepe`, o with `gate`)

    With `gate_norm` the gate stands behind a layer norm: ``W_o (norm(attend(q, k, v) + depthwise(v)) * silu(o))``.

    A mixer gives `attend`, from qk (batch, tokens, 2 heads, head_dim), the heads of q before those of k, from v (batch,
    tokens, heads, head_dim) and the map's height and width to the same shape as v.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim), class tokens and all, where there are neither `lepe` nor `rotary` (`needs_map` says so).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        qkv_bias: Whether the projection to q, k and v has a bias.
        rotary: Whether q and k have rotary position encodings of rows and columns.
        lepe: Odd kernel size of a depthwise convolution of v that is added; None for no convolution.
        gate: Whether a fourth projection multiplies the result, without an activation.
        gate_norm: Whether the result is normalised before the gate, and the gate activated.
        proj_drop: Dropout rate of the result.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `lepe` is even, `rotary` meets heads whose width is no multiple
            of 4, or there is no gate for `gate_norm`.
    """

    entry = "qkv"
    has_rotary: Final[bool]
    gate: Final[bool]
    has_lepe: Final[bool]
    gate_norm: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        rotary: bool,
        lepe: int | None,
        gate: bool,
        gate_norm: bool = False,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        head_dim = dim // num_heads
        if rotary and head_dim % 4:
            raise ValueError(f"num_heads={num_heads} makes heads of {head_dim} channels; rotary needs a multiple of 4")
        if lepe is not None and lepe % 2 == 0:
            raise ValueError(f"lepe={lepe} is even; give an odd kernel size, so that a window has a middle")
        if gate_norm and not gate:
            raise ValueError("gate_norm=True normalises what is gated; give gate=True too")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.has_rotary = rotary
        self.gate = gate
        self.gate_norm = gate_norm
        self.has_lepe = lepe is not None
        self.parts = [2 * dim, dim, dim] if gate else [2 * dim, dim]  # q and k, v, o
        self.needs_map = rotary or self.has_lepe
        self.rotary = RotaryMap() if rotary else nn.Identity()
        self.qkv = nn.Linear(dim, (3 + gate) * dim, bias=qkv_bias, **dd)
        if lepe is not None:
            self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd) if gate_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tokens = self._mix(x.reshape(batch, height * width, dim), height, width)
        return tokens.reshape(batch, height, width, dim)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        return self._mix(x, grid.height, grid.width)

    def _mix(self, x: Tensor, height: int, width: int) -> Tensor:
        parts = self.qkv(x).split(self.parts, dim=-1)
        qk, v = parts[0].unflatten(-1, (2 * self.num_heads, -1)), parts[1]
        out = self.attend(qk, v.unflatten(-1, (self.num_heads, -1)), height, width).to(v.dtype).flatten(2)
        if self.has_lepe:
            cells, around = _cells(out, height, width), _cells(v, height, width)
            # In place on the convolution's output, which no gradient needs.
            out = self.lepe(around).add_(cells).permute(0, 2, 3, 1).flatten(1, 2)
        return self.close(out, parts[2] if self.gate else None)

    def close(self, out: Tensor, o: Tensor | None) -> Tensor:
        """Return the result from the attended values and the gate, both (batch, tokens, dim), None for no gate."""
        if o is None:
            return self.proj_drop(self.proj(out))
        if self.gate_norm:
            out, o = self.norm(out), F.silu(o)
        out, scale = scaled_gate(out, o)
        return self.proj_drop(unscaled(self.proj(out), scale, self.proj(zero_token(out))))


@register_mixer("softmax")
class SoftmaxAttention(Attention):
    """Multi-head attention of every token to all: ``softmax(q k^T * head_dim^-0.5) v``, projected as in `Attention`.

    Shapes, arguments and errors are those of `Attention`, and `attn_drop` is the dropout rate of the weights.

    Source: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929); `rotary`, `lepe` and `gate` as the later stages of MAViT
    (Fan et al. 2025, arXiv 2507.00698) have them, `gate_norm` as those of NaLaFormer (Meng et al. 2025, arXiv
    2506.21137).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        qkv_bias: bool = True,
        rotary: bool = False,
        lepe: int | None = None,
        gate: bool = False,
        gate_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, rotary, lepe, gate, gate_norm, proj_drop, **dd)
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention(attn_drop)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        if self.has_rotary:
            qk = self.rotary(qk, height, width).to(v.dtype)
        q, k = qk.chunk(2, dim=2)
        out = self.dot_product(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, self.fused_attn)
        return out.transpose(1, 2)


def _cells(x: Tensor, height: int, width: int) -> Tensor:
    """Return a sequence (batch, height * width, dim) as a map (batch, dim, height, width)."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class DotProductAttention(nn.Module):
    """``dropout(softmax(q k^T * channels^-0.5 + bias)) v`` of q, k and v (..., heads, tokens, channels).

    Where PyTorch's fused attention does not compute it, the weights (..., heads, queries, keys) go through the module
    `attn_drop`, as in timm's attention, so that a hook there reads them: ``timm.utils.AttentionExtract(model,
    method="hook")`` after ``timm.layers.set_fused_attn(False)``, before the model is built.

    Args:
        attn_drop: Dropout rate of the weights.
    """

    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
        """Return the attended values, shaped as q with the channels of v; arguments as for `softmax_attention`."""
        if fused:
            return _fused(q, k, v, bias, self.attn_drop.p if self.training else 0.0)
        return self.attn_drop(_weights(q, k, bias)) @ v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
    """Return ``softmax(q k^T * channels^-0.5 + bias) v`` of q, k and v (..., heads, tokens, channels).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        bias: Added to the scores, (..., heads, queries, keys), or None.
        fused: Whether PyTorch's fused attention computes it; otherwise it is written out. Mixers pass what timm's
            `use_fused_attn()` returned when they were built.
    """
    return _fused(q, k, v, bias, 0.0) if fused else _weights(q, k, bias) @ v


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, drop: float) -> Tensor:
    # PyTorch does not fuse a mask of three axes; with four, Inductor failed on graphs for all sizes (torch 2.14.1).
    if bias is not None and (torch.jit.is_scripting() or not torch.compiler.is_compiling()):
        bias = bias.unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; give a divisor of dim")
