"""Retention, attention with a fixed exponential decay in place of the softmax: ViR's mixer."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.kernels.gated_linear_attention import gated_linear_attention_op
from visionmix.layers import (
    OrderedMixer,
    ScanLayerNorm,
    at_least_float32,
    scaled,
    scan_dtype,
    unscaled,
    zero_token,
)
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads

_FORMS = ("chunked", "parallel")


@register_mixer("retention")
class Retention(OrderedMixer):
    """Multi-head retention of the tokens before, in three forms that compute the same.

    Per head h, with ``q, k, v = W x + b`` and ``gamma = 1 - 2^(-e)``, where e is 5 + h:

        parallel   y   = dk^-0.5 (q k^T * D) v,  D_nm = gamma^(n - m) for m <= n, else 0
        recurrent  y_n = dk^-0.5 q_n S_n,        S_n  = gamma S_(n-1) + k_n^T v_n
        chunked    parallel inside chunks, recurrent from one to the next

        out = W_o norm(y) + b_o    (the norm is of each head; without head_norm, W_o y + b_o)

    Gated linear attention with a constant gate is the chunked form; its kernels run it. `step` is the recurrent form.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells keep their places in the sequence: a class token sees the whole map
    only where it comes last.

    Source: ViR (Hatamizadeh et al. 2023, arXiv 2310.19731). From it are the one-dimensional retention of tokens in
    raster order, causal, and its three forms. The code that calls itself its authors' (github.com/anom63931/ViR) has
    decays whose e lies evenly from 5 to 9, and no norm: ``decays=(5, 9), head_norm=False``. There the parallel form
    takes a softmax of the decayed products, which the other two forms and the paper's formula leave out; here all three
    agree. The default decays and the norm of each head are those of RetNet (Sun et al. 2023, arXiv 2307.08621), without
    its rotation of q and k, since backbones here bring position embeddings, and without its gate; biases are as in ViT.
    The paper's two-dimensional form is not here.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        form: "chunked", whose cost grows with the tokens' number, or "parallel", whose cost grows with its square.
        qkv_bias: Whether the projection to q, k and v has a bias.
        order: The scan order in which the cells are read. A padded step of an order is a token of zeros.
        norm_eps: Epsilon of the norm.
        decays: e of the first and of the last head, with those of the others evenly between; None for 5 + h.
        head_norm: Whether each head's output is normalised.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `form` is unknown, `decays` are not two positive numbers, or
            there is no such `order`, or it joins several.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        form: str = "chunked",
        qkv_bias: bool = True,
        order: str = "raster",
        norm_eps: float = 1e-5,
        decays: tuple[float, float] | None = None,
        head_norm: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__(order)
        check_heads(dim, num_heads)
        if form not in _FORMS:
            raise ValueError(f"form={form!r} is unknown; give one of {', '.join(map(repr, _FORMS))}")
        if decays is not None and not (isinstance(decays, list | tuple) and len(decays) == 2 and min(decays) > 0):
            raise ValueError(f"decays={decays!r} are not two positive numbers; give (5, 9), or None for 5, 6, 7, ...")
        self.first_decay, self.last_decay = map(float, decays or (5, 4 + num_heads))
        self.in_parallel = form == "parallel"
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.norm = ScanLayerNorm(self.head_dim, eps=norm_eps, **dd) if head_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mixed token (batch, dim) that follows those of `state`, and the state after it.

        Args:
            x: The next token (batch, dim), whatever the order.
            state: What the step before returned, (batch, heads, dk, dv); None at the first token.
        """
        qkv = self.qkv(x)
        q, k, v = self._heads(qkv)
        write = k.unsqueeze(-1) * v.unsqueeze(-2)
        state = write if state is None else write + state * self._log_decays(q).exp()[:, None, None]
        y = self.head_dim**-0.5 * (q.unsqueeze(-2) @ state).squeeze(-2)
        return self._project(y, qkv), state

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v (..., heads, head_dim), in float32 at least."""
        q, k, v = at_least_float32(qkv).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v

    def _log_decays(self, like: Tensor) -> Tensor:
        return _log_decays(self.first_decay, self.last_decay, self.num_heads, like)

    def _project(self, y: Tensor, like: Tensor) -> Tensor:
        """Return the projection (..., dim) of the heads' outputs (..., heads, head_dim), in the type of `like`."""
        y, scale = scaled(self.norm(y).flatten(-2), like)
        return unscaled(self.proj(y), scale, self.proj(zero_token(y)))

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixed tokens of x, both (batch, steps, dim) in the order."""
        qkv = self.qkv(x)
        q, k, v = self._heads(qkv)
        decays = self._log_decays(q)
        scale = self.head_dim**-0.5
        if self.in_parallel:
            scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * (scale * _decay_matrix(decays, x.shape[1]))
            y = (scores @ v.transpose(1, 2)).transpose(1, 2)
        else:
            gates = decays.unsqueeze(-1).expand_as(q)
            y, _ = gated_linear_attention_op(q, k, v, gates, scale, None, False)
        return self._project(y, qkv)


@torch.fx.wrap
def _log_decays(first: float, last: float, heads: int, like: Tensor) -> Tensor:
    """Return the logarithms of the decays ``1 - 2^(-e)`` of `heads` heads, e from `first` to `last`, (heads,)."""
    exponents = torch.linspace(first, last, heads, dtype=scan_dtype(like), device=like.device)
    return torch.log1p(-torch.exp2(-exponents))


@torch.fx.wrap
def _decay_matrix(decays: Tensor, length: int) -> Tensor:
    """Return ``gamma^(n - m)`` where m <= n, else 0, (heads, n, m)."""
    place = torch.arange(length, dtype=decays.dtype, device=decays.device)
    distance = place.unsqueeze(1) - place
    return torch.exp(decays[:, None, None] * distance.clamp(min=0.0)).tril()
