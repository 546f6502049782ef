"""The recurrences as their definitions write them: loops over tokens, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmix import scans


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


def selective_scan_2d(x, delta, A, B, C, D, delta_bias, delta_softplus, orders, merge, permute="all") -> Tensor:
    """One `selective_scan` an order, on the cells it reads, written back cell by cell; delta, B and C in raster order
    for `permute="input"`."""
    if isinstance(delta, tuple):
        delta = torch.einsum("bhwkr,kcr->bhwkc", *delta)
    batch, height, width, channels = x.shape
    routes = []
    for number, name in enumerate(orders):
        index, inverse = scans.order(name, height, width)

        place = index if permute == "all" else range(height * width)

        def read(maps: Tensor, cells) -> Tensor:
            flat = maps.flatten(1, 2)
            steps = [flat[:, cell] if cell >= 0 else torch.zeros_like(flat[:, 0]) for cell in map(int, cells)]
            return torch.stack(steps, -1)

        y, _ = selective_scan(
            read(x, index),
            read(delta[..., number, :], place),
            A[number],
            read(B[..., number, :], place),
            read(C[..., number, :], place),
            None if D is None else D[number],
            None,
            None if delta_bias is None else delta_bias[number],
            delta_softplus,
        )
        for part in inverse.view(-1, height * width).tolist():
            cells = [y[..., step] if step >= 0 else torch.zeros_like(y[..., 0]) for step in part]
            routes.append(torch.stack(cells, 1).view(batch, height, width, channels))
    if merge == "none":
        return torch.stack(routes, 3)
    return sum(routes) / len(routes) if merge == "mean" else sum(routes)
