"""Gated linear attention as its definition is written: a loop over tokens."""

import torch
from torch import Tensor


def gated_linear_attention(q, k, v, g, scale, state=None, reverse=False) -> tuple[Tensor, Tensor]:
    """Return (output, last state); in reverse, from the last token to the first, with each token's own gate."""
    length = q.shape[1]
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        state = g[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out[t] = scale * (q[:, t].unsqueeze(-1) * state).sum(-2)
    return torch.stack(out, 1), state


def bidirectional_gated_linear_attention(q, k, v, g_forward, g_backward, scale, merge) -> Tensor:
    """Return the sum or mean of both directions."""
    # Token t's own gate decays what comes to it, in both directions; the token itself is not decayed.
    out = sum(
        gated_linear_attention(q, k, v, g, scale, None, r)[0] for g, r in ((g_forward, False), (g_backward, True))
    )
    return out / 2 if merge == "mean" else out
