"""The gated delta rule by its definition, token by token."""

import torch
from torch import Tensor


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    """Return o (batch, length, heads, dv) of a state, which forgets, then moves its entry for the key to the value."""
    batch, length, heads, dk = q.shape
    state, outs = q.new_zeros(batch, heads, dk, v.shape[-1]), []
    for t in range(length):
        state = state * g[:, t, :, None, None].exp()
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, dim=1)
