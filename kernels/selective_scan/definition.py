"""The selective scan as its definition is written: a loop over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, gap=None):
    """Return (output, last state)."""
    batch, dim, length = u.shape

    def per_channel(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None, :, :, None].expand(batch, -1, -1, length)
        x = x[:, None] if x.dim() == 3 else x
        return x.repeat_interleave(dim // x.shape[1], 1)

    B, C = per_channel(B), per_channel(C)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(batch, dim, A.shape[1])
    out = []
    for t in range(length):
        step = delta[:, :, t, None]
        through = step if gap is None else step + gap[:, :, t, None]
        state = (through * A).exp() * state + step * B[..., t] * u[:, :, t, None]
        out.append((C[..., t] * state).sum(-1))
    out = torch.stack(out, -1)
    if D is not None:
        out = out + D[:, None] * u
    return (out if z is None else out * F.silu(z)), state
