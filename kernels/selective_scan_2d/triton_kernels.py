"""The Triton kernels of the selective scan of a map; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s<tensor>_<axis>.
"""

import triton
import triton.language as tl

from visionmix.kernels.selective_scan.triton_kernels import LOG2_E, column, combine, set_column, sigmoid, softplus

# Ranks of a low-rank delta that are multiplied out at a time.
RANKS = tl.constexpr(16)


@triton.jit
def _row(b_x, i):
    """Row i of a (rows, columns) tile."""
    return tl.sum(tl.where((tl.arange(0, b_x.shape[0]) == i)[:, None], b_x, 0.0), axis=0)


@triton.jit
def _slots(p_slots, o_t, steps):
    """The steps' slots, route x cells + cell, int32; -1 for padded steps and beyond the end."""
    return tl.load(p_slots + o_t, mask=o_t < steps, other=-1)


@triton.jit
def _place(o_cell, width, stride_h, stride_w):
    """The offsets of cells counted row by row, int64; they are divided in int32, which takes far fewer registers."""
    return (o_cell // width).to(tl.int64) * stride_h + (o_cell % width).to(tl.int64) * stride_w


@triton.jit
def _tile(p_x, o_cell, o_c, width, stride_h, stride_w, stride_c, mask):
    """A (steps, features) tile of a map in float32, 0 outside; `o_cell` counts row by row."""
    o_place = _place(o_cell, width, stride_h, stride_w)
    return tl.load(p_x + o_place[:, None] + o_c[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _delta(
    p_delta, p_weight, p_bias, o_cell, o_c, width, m_step, m_cell, m_c,
    sd_h, sd_w, sd_c, sw_c, sw_r, RANK: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The step sizes (steps, channels), 0 where there is no step, and what softplus took."""
    if RANK > 0:
        b_raw = tl.zeros((o_cell.shape[0], o_c.shape[0]), tl.float32)
        for o_r in tl.range(0, RANK, RANKS, disable_licm=True):
            b_r = _ranks(p_delta, o_cell, o_r + tl.arange(0, RANKS), width, m_cell, sd_h, sd_w, sd_c, RANK)
            b_w = _weight(p_weight, o_c, o_r + tl.arange(0, RANKS), m_c, sw_c, sw_r, RANK)
            b_raw += tl.dot(b_r, tl.trans(b_w), input_precision=PRECISION)
    else:
        b_raw = _tile(p_delta, o_cell, o_c, width, sd_h, sd_w, sd_c, m_cell[:, None] & m_c[None, :])
    if p_bias is not None:
        b_raw += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_delta = softplus(b_raw) if SOFTPLUS else b_raw
    return tl.where(m_step[:, None] & m_c[None, :], b_delta, 0.0), b_raw


@triton.jit
def _ranks(p_delta, o_cell, o_r, width, m_cell, sd_h, sd_w, sd_c, RANK: tl.constexpr):
    return _tile(p_delta, o_cell, o_r, width, sd_h, sd_w, sd_c, m_cell[:, None] & (o_r < RANK)[None, :])


@triton.jit
def _weight(p_weight, o_c, o_r, m_c, sw_c, sw_r, RANK: tl.constexpr):
    p_w = p_weight + o_c[:, None] * sw_c + o_r[None, :] * sw_r
    return tl.load(p_w, mask=m_c[:, None] & (o_r < RANK)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _projection(p_x, o_cell, n, width, stride_h, stride_w, stride_n, m_cell):
    """State n's B or C, (steps, 1)."""
    o_place = _place(o_cell, width, stride_h, stride_w)
    return tl.load(p_x + o_place + n * stride_n, mask=m_cell, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["steps", "cells", "width"])
def forward_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_out, p_states, steps, cells, width, channels,
    sx_b, sx_h, sx_w, sx_c, sd_b, sd_h, sd_w, sd_k, sd_c, sw_k, sw_c, sw_r, sA_k, sA_c, sA_n,
    sB_b, sB_h, sB_w, sB_k, sB_n, sC_b, sC_h, sC_w, sC_k, sC_n, so_b, so_slot, so_cell,
    ORDERS: tl.constexpr, MERGED: tl.constexpr, ZEROED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scans of ORDERS orders, one after the other, each chunk by chunk along its slots.

    `out` is stored by route and cell, at `slot * so_slot + cell * so_cell`; with MERGED the orders' outputs are added
    up cell by cell as they come, in a buffer that is ZEROED or that the first order covers. `states` (batch, K, chunks,
    channels, N), where given, takes the states entering the chunks, and `out` nothing.
    Grid: (batch, tiles of channels, K / ORDERS).
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_n = tl.arange(0, BN)
    orders = tl.num_programs(2) * ORDERS
    chunks = tl.cdiv(steps, BT)
    for number in range(ORDERS):
        i_k = tl.program_id(2).to(tl.int64) * ORDERS + number
        b_h = tl.zeros((BC, BN), tl.float32)
        o_p = i_k * channels
        for i_t in range(chunks):
            o_t = tl.arange(0, BT) + i_t * BT
            b_slot = _slots(p_slots + i_k * steps, o_t, steps)
            m_cell = b_slot >= 0
            o_cell = tl.where(m_cell, b_slot % cells, 0)
            mask = m_cell[:, None] & m_c[None, :]
            if p_states is not None:
                o_s = ((i_b * orders + i_k) * chunks + i_t) * channels * N
                m_h = m_c[:, None] & (o_n < N)[None, :]
                tl.store(p_states + o_s + o_c[:, None] * N + o_n[None, :], b_h, mask=m_h)
            b_x = _tile(p_x + i_b * sx_b, o_cell, o_c, width, sx_h, sx_w, sx_c, mask)
            b_delta, _ = _delta(
                p_delta + i_b * sd_b + i_k * sd_k, None if p_weight is None else p_weight + i_k * sw_k,
                None if p_bias is None else p_bias + o_p, o_cell, o_c, width, o_t < steps, m_cell, m_c,
                sd_h, sd_w, sd_c, sw_c, sw_r, RANK, SOFTPLUS, PRECISION,
            )  # fmt: skip
            b_y = tl.zeros((BT, BC), tl.float32)
            for n in range(N):
                b_A = tl.load(p_A + i_k * sA_k + o_c * sA_c + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
                b_B = _projection(p_B + i_b * sB_b + i_k * sB_k, o_cell, n, width, sB_h, sB_w, sB_n, m_cell)
                b_total, b_s = tl.associative_scan(
                    (tl.exp2(b_delta * (b_A * LOG2_E)[None, :]), b_delta * b_x * b_B), 0, combine
                )
                b_s += b_total * (tl.sum(b_h, axis=1) if N == 1 else column(b_h, n))[None, :]
                if p_out is not None:
                    b_y += b_s * _projection(p_C + i_b * sC_b + i_k * sC_k, o_cell, n, width, sC_h, sC_w, sC_n, m_cell)
                b_end = _row(b_s, BT - 1)
                b_h = b_end[:, None] if N == 1 else set_column(b_h, n, b_end)
            if p_out is not None:
                if p_D is not None:
                    b_y += b_x * tl.load(p_D + o_p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
                p_y = p_out + i_b * so_b + o_c[None, :]
                if MERGED:
                    p_y += o_cell.to(tl.int64)[:, None] * so_cell
                    if ZEROED or number > 0:
                        b_y += tl.load(p_y, mask=mask, other=0.0)
                else:
                    o_y = (b_slot // cells).to(tl.int64) * so_slot + o_cell.to(tl.int64) * so_cell
                    p_y += o_y[:, None]
                tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=mask)
        if MERGED:
            # The next order reads what other threads of the program have stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["steps", "cells", "width"])
def backward_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_states, p_grad,
    p_dx, p_ddelta, p_dweight, p_dA, p_dB, p_dC, p_dD, p_dbias, scale, steps, cells, width, channels, routes,
    sx_b, sx_h, sx_w, sx_c, sd_b, sd_h, sd_w, sd_k, sd_c, sw_k, sw_c, sw_r, sA_k, sA_c, sA_n,
    sB_b, sB_h, sB_w, sB_k, sB_n, sC_b, sC_h, sC_w, sC_k, sC_n, sg_b, sg_h, sg_w, sg_k, sg_c, so_b, so_slot, so_cell,
    ORDERS: tl.constexpr, MERGED: tl.constexpr, ZEROED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of ORDERS orders, one after the other, from the last chunk to the first.

    `dx` is stored as `forward_kernel` stores `out`. By route: ddelta (batch, cells, routes, channels), or of low rank
    (tiles, batch, cells, routes, RANK) to be summed over the tiles, as dB and dC (tiles, batch, cells, routes, N).
    To be summed over the batch: dA (batch, K, channels, N), dD and dbias (batch, K, channels), dweight (batch, K,
    channels, RANK). grad_out is read by route (stride sg_k, 0 where the outputs are merged) and multiplied by `scale`.
    Grid: (batch, tiles of channels, K / ORDERS).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_n = tl.arange(0, BN)
    o_l = tl.arange(0, BT)
    m_h = m_c[:, None] & (o_n < N)[None, :]
    orders = tl.num_programs(2) * ORDERS
    chunks = tl.cdiv(steps, BT)
    o_part = (i_c * tl.num_programs(0) + i_b) * cells * routes
    # Addresses hoisted out of the loops over orders and ranks would spill registers at ranks above RANKS.
    for number in tl.range(ORDERS, disable_licm=RANK > RANKS):
        i_k = tl.program_id(2).to(tl.int64) * ORDERS + number
        o_p = i_k * channels
        o_sum = (i_b * orders + i_k) * channels
        b_flow = tl.zeros((BC, BN), tl.float32)
        b_dA = tl.zeros((BC, BN), tl.float32)
        b_dD = tl.zeros((BC,), tl.float32)
        b_dbias = tl.zeros((BC,), tl.float32)
        for step in range(chunks):
            i_t = chunks - 1 - step
            o_t = o_l + i_t * BT
            m_t = o_t < steps
            b_slot = _slots(p_slots + i_k * steps, o_t, steps)
            m_cell = b_slot >= 0
            o_cell = tl.where(m_cell, b_slot % cells, 0)
            b_route = b_slot // cells
            mask = m_cell[:, None] & m_c[None, :]
            b_x = _tile(p_x + i_b * sx_b, o_cell, o_c, width, sx_h, sx_w, sx_c, mask)
            p_d = p_delta + i_b * sd_b + i_k * sd_k
            p_w = None if p_weight is None else p_weight + i_k * sw_k
            p_s = None if p_bias is None else p_bias + o_p
            b_delta, b_raw = _delta(
                p_d, p_w, p_s, o_cell, o_c, width, m_t, m_cell, m_c,
                sd_h, sd_w, sd_c, sw_c, sw_r, RANK, SOFTPLUS, PRECISION,
            )  # fmt: skip
            # The step sizes that follow; the one after the chunk's last step is in b_flow.
            m_next = (o_l < BT - 1) & (o_t + 1 < steps)
            b_after = _slots(p_slots + i_k * steps, o_t + 1, steps)
            b_next, _ = _delta(
                p_d, p_w, p_s, tl.where(b_after >= 0, b_after % cells, 0), o_c, width, m_next, b_after >= 0, m_c,
                sd_h, sd_w, sd_c, sw_c, sw_r, RANK, SOFTPLUS, PRECISION,
            )  # fmt: skip
            o_g = b_route.to(tl.int64) * sg_k + _place(o_cell, width, sg_h, sg_w)
            p_g = p_grad + i_b * sg_b + o_g[:, None] + o_c[None, :] * sg_c
            b_dy = tl.load(p_g, mask=mask, other=0.0).to(tl.float32) * scale
            o_map = o_cell * routes + b_route
            b_dx = tl.zeros((BT, BC), tl.float32)
            b_ddelta = tl.zeros((BT, BC), tl.float32)
            for n in range(N):
                b_A = tl.load(p_A + i_k * sA_k + o_c * sA_c + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
                b_B = _projection(p_B + i_b * sB_b + i_k * sB_k, o_cell, n, width, sB_h, sB_w, sB_n, m_cell)
                b_C = _projection(p_C + i_b * sC_b + i_k * sC_k, o_cell, n, width, sC_h, sC_w, sC_n, m_cell)
                b_decay = tl.exp2(b_delta * (b_A * LOG2_E)[None, :])
                b_in = b_delta * b_x * b_B
                b_total, b_s = tl.associative_scan((b_decay, b_in), 0, combine)
                p_h = p_states + ((i_b * orders + i_k) * chunks + i_t) * channels * N + o_c * N + n
                b_s += b_total * tl.load(p_h, mask=m_c, other=0.0)[None, :]
                b_total, b_ds = tl.associative_scan(
                    (tl.exp2(b_next * (b_A * LOG2_E)[None, :]), b_dy * b_C), 0, combine, reverse=True
                )
                b_ds += b_total * column(b_flow, n)[None, :]
                b_flow = set_column(b_flow, n, _row(b_decay * b_ds, 0))
                tl.store(p_dB + (o_part + o_map) * N + n, tl.sum(b_ds * b_delta * b_x, axis=1), mask=m_cell)
                tl.store(p_dC + (o_part + o_map) * N + n, tl.sum(b_dy * b_s, axis=1), mask=m_cell)
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
                b_ddelta *= tl.where(b_raw > 20.0, 1.0, sigmoid(b_raw))
            # A padded step has a step size too, from the bias alone.
            b_ddelta = tl.where(m_t[:, None] & m_c[None, :], b_ddelta, 0.0)
            b_dbias += tl.sum(b_ddelta, axis=0)
            if RANK > 0:
                for o_first in tl.range(0, RANK, RANKS, disable_licm=True):
                    o_q = o_first + tl.arange(0, RANKS)
                    b_w = _weight(p_w, o_c, o_q, m_c, sw_c, sw_r, RANK)
                    p_r = p_ddelta + (o_part + o_map)[:, None] * RANK + o_q[None, :]
                    m_r = m_cell[:, None] & (o_q < RANK)[None, :]
                    tl.store(p_r, tl.dot(b_ddelta, b_w, input_precision=PRECISION), mask=m_r)
                    b_r = _ranks(p_d, o_cell, o_q, width, m_cell, sd_h, sd_w, sd_c, RANK)
                    b_dw = tl.dot(tl.trans(b_r), b_ddelta, input_precision=PRECISION)
                    p_o = p_dweight + (o_sum + o_c)[None, :] * RANK + o_q[:, None]
                    m_o = m_c[None, :] & (o_q < RANK)[:, None]
                    if step > 0:
                        b_dw += tl.load(p_o, mask=m_o, other=0.0)
                    tl.store(p_o, b_dw, mask=m_o)
                # The next chunk adds to it; registers do not hold all ranks.
                tl.debug_barrier()
            else:
                p_r = p_ddelta + (i_b * cells * routes + o_map)[:, None] * channels + o_c[None, :]
                tl.store(p_r, b_ddelta.to(p_ddelta.dtype.element_ty), mask=mask)
            p_o = p_dx + i_b * so_b + o_c[None, :]
            if MERGED:
                p_o += o_cell.to(tl.int64)[:, None] * so_cell
                if ZEROED or number > 0:
                    b_dx += tl.load(p_o, mask=mask, other=0.0)
            else:
                p_o += (b_route.to(tl.int64) * so_slot + o_cell.to(tl.int64) * so_cell)[:, None]
            tl.store(p_o, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        tl.store(p_dA + o_sum * N + o_c[:, None] * N + o_n[None, :], b_dA, mask=m_h)
        if p_dD is not None:
            tl.store(p_dD + o_sum + o_c, b_dD, mask=m_c)
        if p_dbias is not None:
            tl.store(p_dbias + o_sum + o_c, b_dbias, mask=m_c)
        if MERGED:
            # The next order reads what other threads of the program have stored.
            tl.debug_barrier()
