"""Peers of the fused ops in benchmarks: their definitions written out, and other packages at their best settings."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_token_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return the selective scan by its definition, as mamba_ssm's `selective_scan_ref` computes it: a step per token.

    u, delta (batch, dim, length); A (dim, states); B, C (batch, states, length); D (dim,). Softplus is applied.
    """
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    update = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = torch.zeros_like(update[:, :, 0])
    outputs = []
    for step in range(u.shape[-1]):
        state = decay[:, :, step] * state + update[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, step]))
    return torch.stack(outputs, dim=-1) + u * D[:, None]


def selective_scan_mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return the selective scan by mambapy's parallel scan; arguments as above."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta).transpose(1, 2)
    u = u.transpose(1, 2)
    update = delta[..., None] * B.transpose(1, 2)[:, :, None] * u[..., None]
    states = pscan(torch.exp(delta[..., None] * A), update)
    return ((states @ C.transpose(1, 2)[..., None])[..., 0] + u * D).transpose(1, 2)


def selective_scan_mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return the selective scan by mamba_ssm's CUDA kernel; arguments as above, on a GPU."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, delta_softplus=True)


def gated_linear_attention_token_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Return gated linear attention by its definition, a step per token; (batch, length, heads, dim)."""
    batch, length, heads, dk = q.shape
    state = q.new_zeros(batch, heads, dk, v.shape[-1])
    decay, outputs = g.exp(), []
    for step in range(length):
        state = decay[:, step, ..., None] * state + k[:, step, ..., None] * v[:, step, :, None]
        outputs.append((q[:, step, :, None] @ state)[..., 0, :])
    return torch.stack(outputs, dim=1) * dk**-0.5


def window_starts(length: int, kernel_size: int, dilation: int) -> Tensor:
    """Return, for every position of an axis, the first of the keys it sees."""
    position = torch.arange(length)
    residue, cell = position % dilation, position // dilation
    cells = (length - 1 - residue) // dilation + 1
    start = (cell - kernel_size // 2).clamp(min=0).minimum(cells - kernel_size)
    return start * dilation + residue


def na2d_gather(query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Return 2-D neighborhood attention by gathering each query's keys; (batch, height, width, heads, dim)."""
    batch, height, width, heads, dim = query.shape
    steps = torch.arange(kernel_size) * dilation
    rows = window_starts(height, kernel_size, dilation)[:, None] + steps
    columns = window_starts(width, kernel_size, dilation)[:, None] + steps
    cells = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(height * width, -1).to(key.device)
    keys = key.reshape(batch, height * width, heads, dim)[:, cells]
    values = value.reshape(batch, height * width, heads, dim)[:, cells]
    scores = torch.einsum("bthd,btkhd->bthk", query.reshape(batch, -1, heads, dim) * dim**-0.5, keys)
    return torch.einsum("bthk,btkhd->bthd", scores.softmax(-1), values).reshape(query.shape)


def na2d_flex_attention(height: int, width: int, kernel_size: int, dilation: int, device: str) -> Callable[..., Tensor]:
    """Return a function that computes 2-D neighborhood attention by compiled FlexAttention with the same mask.

    It takes query, key and value (batch, height, width, heads, dim), and a bias or None, (heads, distances, distances)
    with 2 kernel_size - 1 distances along an axis.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first_row = window_starts(height, kernel_size, dilation).to(device)
    first_column = window_starts(width, kernel_size, dilation).to(device)

    def seen(b, h, q, k):
        row, column = k // width - first_row[q // width], k % width - first_column[q % width]
        reach = kernel_size * dilation
        rows = (row >= 0) & (row < reach) & (row % dilation == 0)
        return rows & (column >= 0) & (column < reach) & (column % dilation == 0)

    mask = create_block_mask(seen, None, None, height * width, height * width, device=device)
    compiled = torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        def biased(score, b, h, q, k):
            row = (k // width - q // width) // dilation + kernel_size - 1
            column = (k % width - q % width) // dilation + kernel_size - 1
            # Pairs that the mask hides are computed too.
            last = 2 * kernel_size - 2
            return score + bias[h, row.clamp(0, last), column.clamp(0, last)]

        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        scored = None if bias is None else biased
        return compiled(q, k, v, score_mod=scored, block_mask=mask).transpose(1, 2).reshape(query.shape)

    return attend
