"""The Triton kernels of the selective scan of a map; `triton.py` launches them and says how they work together.

Maps have one axis of cells. Channel strides are not specialised: knowing that channels lie side by side, the compiler
would give a thread four of them and spread the steps of a scan over the others. As it is, in a program of one warp a
thread has all steps of its channels, or one of two that share them, and scans nearly without exchange.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s<tensor>_<axis>.
"""

import triton
import triton.language as tl

from visionmix.kernels.selective_scan.triton_kernels import LOG2_E, combine, sigmoid, softplus

# Ranks of a low-rank delta's gradient that are multiplied out at a time.
RANKS = tl.constexpr(16)

_UNSPECIALISED = ["steps", "cells", "sx_c", "sd_c", "sw_c", "sg_c", "so_c"]


@triton.jit
def _combine_and_before(a, b, a_before, b_before, a_next, b_next, a_next_before, b_next_before):
    """`combine`, and what it makes without the last step."""
    return a * a_next, a_next * b + b_next, a * a_next_before, a_next_before * b + b_next_before


@triton.jit
def state_gradients(b_decay, b_direct, b_flow):
    """The gradients dh (steps, channels) of a chunk's states, and what flows on into the chunk before (channels,).

    With `g_t = decay_t dh_t` what a step hands to the one before it, `dh_t = direct_t + g_(t+1)`; `flow` is g after the
    last step. The reverse scan makes g, and g without its last step, so that no step need be shifted.
    """
    one, zero = tl.full(b_decay.shape, 1.0, tl.float32), tl.zeros(b_decay.shape, tl.float32)
    _, _, b_total, b_before = tl.associative_scan(
        (b_decay, b_decay * b_direct, one, zero), 0, _combine_and_before, reverse=True
    )
    b_dh = b_direct + b_before + b_total * b_flow[None, :]
    return b_dh, row(b_decay * b_dh, 0)


@triton.jit
def row(b_x, i):
    """Row i of a (rows, columns) tile."""
    return tl.sum(tl.where((tl.arange(0, b_x.shape[0]) == i)[:, None], b_x, 0.0), axis=0)


@triton.jit
def column(b_x, i):
    """Column i of a (rows, columns) tile."""
    return tl.sum(tl.where((tl.arange(0, b_x.shape[1]) == i)[None, :], b_x, 0.0), axis=1)


@triton.jit
def set_column(b_x, i, b_column):
    """The tile with column i replaced."""
    return tl.where((tl.arange(0, b_x.shape[1]) == i)[None, :], b_column[:, None], b_x)


@triton.jit
def _channels(BC: tl.constexpr, INT64: tl.constexpr):
    """The program's channels; int32 unless offsets in a map need INT64, which takes twice the registers."""
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    return o_c.to(tl.int64) if INT64 else o_c


@triton.jit
def _cells(p_slots, o_t, steps, cells, i_k, JOINED: tl.constexpr, INT64: tl.constexpr):
    """The steps' cells, 0 where there is none, their routes, and where there is one.

    The table holds cells, or route x cells + cell where an order has JOINED routes; -1 for padded steps.
    """
    b_slot = tl.load(p_slots + o_t, mask=o_t < steps, other=-1)
    m_cell = b_slot >= 0
    o_cell = tl.where(m_cell, b_slot, 0)
    b_route = i_k
    if JOINED:
        b_route = (o_cell // cells).to(tl.int64)
        o_cell = o_cell % cells
    return o_cell.to(tl.int64) if INT64 else o_cell, b_route, m_cell


@triton.jit
def _routed(p_x, o_cell, o_c, b_route, stride_k, stride_t, stride_c, JOINED: tl.constexpr):
    """Pointers to a (steps, channels) tile of maps by route."""
    p_tile = p_x + o_cell[:, None] * stride_t + o_c[None, :] * stride_c
    return p_tile + b_route[:, None] * stride_k if JOINED else p_tile + b_route * stride_k


@triton.jit
def _tile(p_x, o_cell, o_c, stride_t, stride_c, mask):
    """A (steps, features) tile of a map in float32, 0 outside."""
    return tl.load(p_x + o_cell[:, None] * stride_t + o_c[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _delta(
    p_delta, p_weight, p_bias, o_cell, o_c, m_step, m_cell, m_c, sd_t, sd_c, sw_c, sw_r,
    RANK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The step sizes (steps, channels), 0 where there is no step, and what softplus took."""
    if RANK > 0:
        b_raw = tl.zeros((o_cell.shape[0], o_c.shape[0]), tl.float32)
        # A tl.dot would give each thread a few steps of many channels.
        for r in tl.range(0, RANK, loop_unroll_factor=2):
            b_r = tl.load(p_delta + o_cell * sd_t + r * sd_c, mask=m_cell, other=0.0).to(tl.float32)
            b_w = tl.load(p_weight + o_c * sw_c + r * sw_r, mask=m_c, other=0.0).to(tl.float32)
            b_raw += b_r[:, None] * b_w[None, :]
    else:
        b_raw = _tile(p_delta, o_cell, o_c, sd_t, sd_c, m_cell[:, None] & m_c[None, :])
    if p_bias is not None:
        b_raw += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_delta = softplus(b_raw) if SOFTPLUS else b_raw
    return tl.where(m_step[:, None] & m_c[None, :], b_delta, 0.0), b_raw


@triton.jit
def _projection(p_x, o_cell, stride_t, m_cell):
    """One state's B or C, (steps, 1)."""
    return tl.load(p_x + o_cell * stride_t, mask=m_cell, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_out, p_states, steps, cells, channels,
    sx_b, sx_t, sx_c, sd_b, sd_t, sd_k, sd_c, sw_k, sw_c, sw_r, sA_k, sA_c, sA_n,
    sB_b, sB_t, sB_k, sB_n, sC_b, sC_t, sC_k, sC_n, so_b, so_k, so_t, so_c,
    RANK: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
    JOINED: tl.constexpr, INT64: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """`h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_o(t)`, `y_o(t) = C_t h_t + D x_o(t)`: the scan of one order o.

    delta, B and C at step t are those of the cell o(t). Chunk by chunk along the order's slots.

    `out` is stored by route and cell. `states` (batch, K, chunks, channels, N), where given, takes the states entering
    the chunks, and `out` nothing.
    Grid: (batch, tiles of channels, K).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(2).to(tl.int64)
    o_c = _channels(BC, INT64)
    m_c = o_c < channels
    o_n = tl.arange(0, BN)
    orders = tl.num_programs(2)
    chunks = tl.cdiv(steps, BT)
    b_h = tl.zeros((BC, BN), tl.float32)
    o_p = i_k * channels
    for i_t in range(chunks):
        o_t = tl.arange(0, BT) + i_t * BT
        o_cell, b_route, m_cell = _cells(p_slots + i_k * steps, o_t, steps, cells, i_k, JOINED, INT64)
        mask = m_cell[:, None] & m_c[None, :]
        if p_states is not None:
            o_s = ((i_b * orders + i_k) * chunks + i_t) * channels * N
            m_h = m_c[:, None] & (o_n < N)[None, :]
            tl.store(p_states + o_s + o_c[:, None] * N + o_n[None, :], b_h, mask=m_h)
        # (steps, channels)
        b_x = _tile(p_x + i_b * sx_b, o_cell, o_c, sx_t, sx_c, mask)
        b_delta, _ = _delta(
            p_delta + i_b * sd_b + i_k * sd_k, None if p_weight is None else p_weight + i_k * sw_k,
            None if p_bias is None else p_bias + o_p, o_cell, o_c, o_t < steps, m_cell, m_c,
            sd_t, sd_c, sw_c, sw_r, RANK, SOFTPLUS,
        )  # fmt: skip
        b_y = tl.zeros((BT, BC), tl.float32)
        for n in range(N):
            # (channels,); B and C (steps, 1)
            b_A = tl.load(p_A + i_k * sA_k + o_c * sA_c + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
            b_B = _projection(p_B + i_b * sB_b + i_k * sB_k + n * sB_n, o_cell, sB_t, m_cell)
            b_total, b_s = tl.associative_scan(
                (tl.exp2(b_delta * (b_A * LOG2_E)[None, :]), b_delta * b_x * b_B), 0, combine
            )
            b_s += b_total * (tl.sum(b_h, axis=1) if N == 1 else column(b_h, n))[None, :]
            if p_out is not None:
                b_y += b_s * _projection(p_C + i_b * sC_b + i_k * sC_k + n * sC_n, o_cell, sC_t, m_cell)
            b_end = row(b_s, BT - 1)
            b_h = b_end[:, None] if N == 1 else set_column(b_h, n, b_end)
        if p_out is not None:
            if p_D is not None:
                b_y += b_x * tl.load(p_D + o_p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            p_y = _routed(p_out + i_b * so_b, o_cell, o_c, b_route, so_k, so_t, so_c, JOINED)
            tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_states, p_grad,
    p_dx, p_ddelta, p_dweight, p_dA, p_dB, p_dC, p_dD, p_dbias, scale, steps, cells, channels, routes,
    sx_b, sx_t, sx_c, sd_b, sd_t, sd_k, sd_c, sw_k, sw_c, sw_r, sA_k, sA_c, sA_n,
    sB_b, sB_t, sB_k, sB_n, sC_b, sC_t, sC_k, sC_n, sg_b, sg_t, sg_k, sg_c, so_b, so_k, so_t, so_c,
    RANK: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
    JOINED: tl.constexpr, INT64: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one order, as `selective_scan`'s `backward_kernel` has them, at the cells that the steps read.

    With `g_t = C_t dy_o(t) + exp(delta_(t+1) A) g_(t+1)`, from the last chunk to the first.

    `dx` is stored as `forward_kernel` stores `out`. By route: ddelta (batch, cells, routes, channels), or of low rank
    (tiles, batch, cells, routes, RANK) to be summed over the tiles, as dB and dC (tiles, batch, cells, routes, N).
    To be summed over the batch: dA (batch, K, channels, N), dD and dbias (batch, K, channels), dweight (batch, K,
    channels, RANK). grad_out is read by route (stride sg_k, 0 where the outputs are merged) and multiplied by `scale`.
    Grid: (batch, tiles of channels, K).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1).to(tl.int64)
    i_k = tl.program_id(2).to(tl.int64)
    o_c = _channels(BC, INT64)
    m_c = o_c < channels
    o_n = tl.arange(0, BN)
    m_h = m_c[:, None] & (o_n < N)[None, :]
    orders = tl.num_programs(2)
    chunks = tl.cdiv(steps, BT)
    o_part = (i_c * tl.num_programs(0) + i_b) * cells * routes
    o_p = i_k * channels
    o_sum = (i_b * orders + i_k) * channels
    b_flow = tl.zeros((BC, BN), tl.float32)
    b_dA = tl.zeros((BC, BN), tl.float32)
    b_dD = tl.zeros((BC,), tl.float32)
    b_dbias = tl.zeros((BC,), tl.float32)
    # Of many states, addresses hoisted out of the loop would spill registers on sm_80.
    for step in tl.range(chunks, disable_licm=N > 1):
        i_t = chunks - 1 - step
        o_t = tl.arange(0, BT) + i_t * BT
        m_t = o_t < steps
        o_cell, b_route, m_cell = _cells(p_slots + i_k * steps, o_t, steps, cells, i_k, JOINED, INT64)
        mask = m_cell[:, None] & m_c[None, :]
        # (steps, channels)
        b_x = _tile(p_x + i_b * sx_b, o_cell, o_c, sx_t, sx_c, mask)
        p_d = p_delta + i_b * sd_b + i_k * sd_k
        p_w = None if p_weight is None else p_weight + i_k * sw_k
        b_delta, b_raw = _delta(
            p_d, p_w, None if p_bias is None else p_bias + o_p, o_cell, o_c, m_t, m_cell, m_c,
            sd_t, sd_c, sw_c, sw_r, RANK, SOFTPLUS,
        )  # fmt: skip
        p_g = _routed(p_grad + i_b * sg_b, o_cell, o_c, b_route, sg_k, sg_t, sg_c, JOINED)
        b_dy = tl.load(p_g, mask=mask, other=0.0).to(tl.float32) * scale
        o_map = o_cell * routes + b_route.to(o_cell.dtype)
        b_dx = tl.zeros((BT, BC), tl.float32)
        b_ddelta = tl.zeros((BT, BC), tl.float32)
        for n in range(N):
            # (channels,); B and C (steps, 1)
            b_A = tl.load(p_A + i_k * sA_k + o_c * sA_c + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
            b_B = _projection(p_B + i_b * sB_b + i_k * sB_k + n * sB_n, o_cell, sB_t, m_cell)
            b_C = _projection(p_C + i_b * sC_b + i_k * sC_k + n * sC_n, o_cell, sC_t, m_cell)
            b_decay = tl.exp2(b_delta * (b_A * LOG2_E)[None, :])
            b_in = b_delta * b_x * b_B
            b_total, b_s = tl.associative_scan((b_decay, b_in), 0, combine)
            p_h = p_states + ((i_b * orders + i_k) * chunks + i_t) * channels * N + o_c * N + n
            b_s += b_total * tl.load(p_h, mask=m_c, other=0.0)[None, :]
            b_ds, b_end = state_gradients(b_decay, b_dy * b_C, column(b_flow, n))
            b_flow = set_column(b_flow, n, b_end)
            tl.store(p_dB + o_part * N + o_map * N + n, tl.sum(b_ds * b_delta * b_x, axis=1), mask=m_cell)
            tl.store(p_dC + o_part * N + o_map * N + n, tl.sum(b_dy * b_s, axis=1), mask=m_cell)
            b_dx += b_ds * b_B
            b_through = b_ds * (b_s - b_in)
            b_ddelta += b_through * b_A[None, :]
            b_dA = set_column(b_dA, n, column(b_dA, n) + tl.sum(b_through * b_delta, axis=0))
        b_ddelta += b_dx * b_x
        b_dx *= b_delta
        if p_D is not None:
            b_dx += b_dy * tl.load(p_D + o_p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            b_dD += tl.sum(b_dy * b_x, axis=0)
        if SOFTPLUS:
            b_ddelta *= sigmoid(b_raw)
        # A padded step has a step size too, from the bias alone.
        b_ddelta = tl.where(m_t[:, None] & m_c[None, :], b_ddelta, 0.0)
        b_dbias += tl.sum(b_ddelta, axis=0)
        if RANK > 0:
            for o_first in tl.range(0, RANK, RANKS, disable_licm=True):
                o_q = o_first + tl.arange(0, RANKS)
                m_q = o_q < RANK
                p_wt = p_w + o_c[:, None] * sw_c + o_q[None, :] * sw_r
                b_w = tl.load(p_wt, mask=m_c[:, None] & m_q[None, :], other=0.0).to(tl.float32)
                p_r = p_ddelta + o_part * RANK + o_map[:, None] * RANK + o_q[None, :]
                m_r = m_cell[:, None] & m_q[None, :]
                tl.store(p_r, tl.dot(b_ddelta, b_w, input_precision=PRECISION), mask=m_r)
                b_r = _tile(p_d, o_cell, o_q, sd_t, sd_c, m_r)
                b_dw = tl.dot(tl.trans(b_r), b_ddelta, input_precision=PRECISION)
                p_o = p_dweight + (o_sum + o_c)[None, :] * RANK + o_q[:, None]
                m_o = m_c[None, :] & m_q[:, None]
                if step > 0:
                    b_dw += tl.load(p_o, mask=m_o, other=0.0)
                tl.store(p_o, b_dw, mask=m_o)
            # The next chunk adds to it; registers do not hold all ranks.
            tl.debug_barrier()
        else:
            p_r = p_ddelta + i_b * cells * routes * channels + o_map[:, None] * channels + o_c[None, :] * so_c
            tl.store(p_r, b_ddelta.to(p_ddelta.dtype.element_ty), mask=mask)
        p_o = _routed(p_dx + i_b * so_b, o_cell, o_c, b_route, so_k, so_t, so_c, JOINED)
        tl.store(p_o, b_dx.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dA + o_sum * N + o_c[:, None] * N + o_n[None, :], b_dA, mask=m_h)
    if p_dD is not None:
        tl.store(p_dD + o_sum + o_c, b_dD, mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_sum + o_c, b_dbias, mask=m_c)
