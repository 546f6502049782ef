"""Gated linear attention, in one and in both directions.

The functions named after the ops check what they are given. Mixers call `gated_linear_attention_op` and
`bidirectional_op`, which check nothing: they script, trace and export.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import (
    check_flags,
    check_merge,
    check_out_dtype,
    check_scale,
    check_shape,
    check_sizes,
    check_tensors,
)
from visionmix.kernels.gated_linear_attention import op as _registered  # noqa: F401
from visionmix.kernels.gated_linear_attention import reference
from visionmix.kernels.gated_linear_attention.schema import Arguments, BidirectionalArguments

__all__ = [
    "bidirectional_gated_linear_attention",
    "bidirectional_op",
    "gated_linear_attention",
    "gated_linear_attention_op",
]


def gated_linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """Return (output, final state) of gated linear attention, the state empty unless asked for."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            arguments = Arguments(q, k, v, g, scale, initial_state, output_final_state)
            return dispatch.call_reference(reference.forward, arguments)
    return torch.ops.visionmix.gated_linear_attention(q, k, v, g, scale, initial_state, output_final_state)


def bidirectional_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float,
    merge: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return gated linear attention in both directions, merged by "mean" or "sum".

    The output has `out_dtype`, or v's type if None: torch.float32 where a norm follows that needs what half precision
    cannot hold.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            arguments = BidirectionalArguments(q, k, v, g_forward, g_backward, scale, merge, out_dtype=out_dtype)
            return dispatch.call_reference(reference.bidirectional_forward, arguments)
    return torch.ops.visionmix.bidirectional_gated_linear_attention(
        q, k, v, g_forward, g_backward, scale, merge, "auto", out_dtype
    )


def _check(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], initial_state: Tensor | None) -> None:
    tensors = {"q": q, "k": k, "v": v, **gates, "initial_state": initial_state}
    check_tensors(tensors, dict.fromkeys(tensors, (4,)), ("q", "k", "v", *gates))
    check_sizes("q", q)
    check_sizes("v", v)
    batch, length, heads, dk = q.shape
    axes = {"batch": batch, "length": length, "heads": heads}
    for name, x in {"k": k, **gates}.items():
        check_shape(name, x, axes | {"dk": dk})
    check_shape("v", v, axes | {"dv": v.shape[-1]})
    check_shape("initial_state", initial_state, {"batch": batch, "heads": heads, "dk": dk, "dv": v.shape[-1]})


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: a matrix state per head, decayed per key channel by a gate that depends on the token.

    `h_t = diag(exp(g_t)) h_(t-1) + k_t^T v_t`, `o_t = scale q_t h_t`: the current token counts, undecayed. The
    arguments are those of flash-linear-attention. Yang et al., 2023, Gated Linear Attention Transformers with
    Hardware-Efficient Training (arXiv 2312.06635).

    Args:
        q: queries (batch, length, heads, dk), of any floating-point dtype, as the others.
        k: keys (batch, length, heads, dk).
        v: values (batch, length, heads, dv).
        g: logarithms of the decays (batch, length, heads, dk), at most 0. Values are not checked: a positive one makes
            the state grow.
        scale: factor of the queries; dk^-0.5 if None.
        initial_state: h_0 (batch, heads, dk, dv); zeros if None.
        output_final_state: whether to return the state after the last token.

    Returns:
        The output (batch, length, heads, dv) in v's dtype, and the final state (batch, heads, dk, dv) or None. The
        state is float32, or float64 if any input is; so is the computation.

    Raises:
        TypeError: an argument is not a real floating-point tensor, or an option of another kind.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, or `scale` is not finite.
    """
    check_scale(scale)
    check_flags(output_final_state=output_final_state)
    _check(q, k, v, {"g": g}, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = gated_linear_attention_op(q, k, v, g, scale, initial_state, output_final_state)
    return out, state if output_final_state else None


def bidirectional_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float | None = None,
    merge: str = "mean",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gated linear attention from both ends of the sequence, with shared q, k and v and a gate for each direction.

    `f_t = diag(exp(g_forward_t)) f_(t-1) + k_t^T v_t`, `b_t = diag(exp(g_backward_t)) b_(t+1) + k_t^T v_t`,
    `o_t = scale q_t (f_t + b_t)`, halved for "mean". Both directions count the current token, undecayed. Liao et al.,
    2024, ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention (arXiv 2405.18425).

    Args:
        q: queries (batch, length, heads, dk), of any floating-point dtype, as the others.
        k: keys (batch, length, heads, dk).
        v: values (batch, length, heads, dv).
        g_forward: logarithms of the forward decays (batch, length, heads, dk), at most 0 (not checked).
        g_backward: the same for the backward direction, in the order of the tokens: token t's gate decays the state
            that comes from token t + 1.
        scale: factor of the queries; dk^-0.5 if None.
        merge: "mean" or "sum" of the directions.
        out_dtype: type of the output, v's if None. Under mixed precision torch.float32 keeps outputs that half
            precision cannot hold, or would round, until the norm after the attention brings them back to its range.

    Returns:
        The output (batch, length, heads, dv) in `out_dtype`; computed in float32, or float64 if any input is.

    Raises:
        TypeError: an argument is not a real floating-point tensor, `scale` no number, or `out_dtype` no dtype.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, `merge` is unknown, `scale`
            is not finite, or `out_dtype` is not of floating-point numbers.
    """
    check_scale(scale)
    check_out_dtype(out_dtype)
    check_merge(merge, ("mean", "sum"))
    _check(q, k, v, {"g_forward": g_forward, "g_backward": g_backward}, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return bidirectional_op(q, k, v, g_forward, g_backward, scale, merge, out_dtype)
