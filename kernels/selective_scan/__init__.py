"""The selective scan of Mamba.

`selective_scan` checks what it is given. Mixers call `selective_scan_op`, which checks nothing: it scripts, traces and
exports.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_flags, check_out_dtype, check_shape, check_sizes, check_tensors
from visionmix.kernels.selective_scan import op as _registered  # noqa: F401
from visionmix.kernels.selective_scan import reference
from visionmix.kernels.selective_scan.schema import Arguments

__all__ = ["selective_scan", "selective_scan_op"]

_RANKS = {"u": (3,), "delta": (3,), "A": (2,), "B": (2, 3, 4), "C": (2, 3, 4), "D": (1,), "z": (3,)}
_RANKS |= {"delta_bias": (1,), "gap": (3,)}


def selective_scan_op(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, return_last_state: bool, gap: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (output, last state) of the selective scan, the state empty unless asked for.

    The output has `out_dtype`, or u's type if None: torch.float32 where a norm follows that needs what half precision
    cannot hold.

    B and C are (batch, groups, states, length) or, constant, (dim, states); gap is (batch, dim, length).
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            arguments = Arguments(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, gap, out_dtype=out_dtype
            )
            out, state, _ = dispatch.call_reference(reference.forward, arguments)
            return out, state
    # A graph made by torch.jit.trace must not depend on the mode: its backward pass finds the states again.
    keep_states = torch.is_grad_enabled() and not torch.jit.is_tracing()
    out, state, _ = torch.ops.visionmix.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, gap, keep_states, "auto", out_dtype
    )
    return out, state


def _check_projection(name: str, x: Tensor, batch: int, dim: int, states: int, length: int) -> None:
    if x.dim() == 2:
        check_shape(name, x, {"dim": dim, "states": states})
    elif x.dim() == 3:
        check_shape(name, x, {"batch": batch, "states": states, "length": length})
    else:
        groups = x.shape[1]
        check_shape(name, x, {"batch": batch, "groups": groups, "states": states, "length": length})
        if groups == 0 or dim % groups:
            raise ValueError(f"{name} has groups={groups}, which does not divide dim={dim}; choose a divisor of dim")


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    gap: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan: a diagonal linear state space whose step size, input and output depend on the token.

    `h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t`, `y_t = sum_n C_tn h_tn + D u_t`, times `silu(z_t)` where z is
    given, from h_0 = 0. delta_t is `softplus(delta_t + delta_bias)` with `delta_softplus` (x itself above 20).
    Arguments and layouts are those of mamba_ssm. Gu and Dao, 2023, Mamba: Linear-Time Sequence Modeling with Selective
    State Spaces (arXiv 2312.00752).

    Where tokens were taken out of the sequence, `gap` lets the state cross their places: it decays by `exp((delta_t +
    gap_t) A)` on its way to token t, where gap_t is the sum of the steps of the tokens taken out between t and its
    predecessor. That is the scan of the whole sequence with an input of 0 in the gaps, read at the remaining tokens.

    Args:
        u: input (batch, dim, length), of any floating-point dtype, as the others.
        delta: step sizes (batch, dim, length).
        A: decay rates (dim, states), real and usually negative.
        B: input projection, (batch, states, length), or (batch, groups, states, length), where each of the groups
            serves dim / groups consecutive channels, or constant (dim, states).
        C: output projection, in one of the same shapes; with as many groups as B where both depend on the token.
        D: skip (dim,).
        z: gate (batch, dim, length).
        delta_bias: added to delta (dim,).
        delta_softplus: whether delta goes through softplus.
        return_last_state: whether to return the state after the last token.
        gap: steps of the places without a token since the token before, added up (batch, dim, length), on the scale of
            delta after the softplus. On a GPU the PyTorch reference runs for it.
        out_dtype: type of the output, u's if None. Under mixed precision torch.float32 keeps outputs that half
            precision cannot hold, or would round, until the norm after the scan brings them back to its range.

    Returns:
        The output (batch, dim, length) in `out_dtype`, or (output, state) with the state (batch, dim, states). The
        state is float32, or float64 if any input is; so is the computation.

    Raises:
        TypeError: an argument is not a real floating-point tensor (complex A is not supported), an option no bool, or
            `out_dtype` no dtype.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, or `out_dtype` is not of
            floating-point numbers.
    """
    check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state)
    check_out_dtype(out_dtype)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors["gap"] = gap
    check_tensors(tensors, _RANKS, ("u", "delta", "A", "B", "C"))
    check_sizes("u", u)
    check_sizes("A", A)
    batch, dim, length = u.shape
    for name in ("delta", "z", "gap"):
        check_shape(name, tensors[name], {"batch": batch, "dim": dim, "length": length})
    for name in ("D", "delta_bias"):
        check_shape(name, tensors[name], {"dim": dim})
    states = A.shape[1]
    check_shape("A", A, {"dim": dim, "states": states})
    _check_projection("B", B, batch, dim, states, length)
    _check_projection("C", C, batch, dim, states, length)
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    if B.dim() == C.dim() == 4 and B.shape[1] != C.shape[1]:
        raise ValueError(f"B has {B.shape[1]} groups and C has {C.shape[1]}; give them the same number")
    options = (delta_softplus, return_last_state, gap, out_dtype)
    out, state = selective_scan_op(u, delta, A, B, C, D, z, delta_bias, *options)
    return (out, state) if return_last_state else out
