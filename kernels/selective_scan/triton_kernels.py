"""The Triton kernels of the selective scan; `triton.py` launches them and says how they work together.

Tiles are (tokens, channels). Strides of tokens and channels are not specialised: knowing what lies side by side, the
compiler would give a thread four of those and spread the tokens of a scan over more of them. As it is, in a program of
one warp four threads share the tokens of a channel.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s<tensor>_<axis>.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(a_first, b_first, a_second, b_second):
    """The composition of two steps `h -> a h + b`, the first one first."""
    return a_first * a_second, a_second * b_first + b_second


@triton.jit
def softplus(b_x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), exact to float32 for small results too.

    log(1 + e) = 2 artanh(z) with z = e / (2 + e) <= 1/3, z times a polynomial in z^2 that is 4e-9 from it.
    """
    b_e = tl.exp(-tl.abs(b_x))
    b_z = b_e / (2.0 + b_e)
    b_w = b_z * b_z
    b_p = 0.40024852 + b_w * (0.27961426 + b_w * 0.28174666)
    return tl.maximum(b_x, 0.0) + b_z * (2.0 + b_w * (0.66666316 + b_w * b_p))


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)), without overflow."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


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
def _load(p_x, o_c, o_t, stride_c, stride_t, mask):
    """A (tokens, channels) tile in float32, 0 outside."""
    return tl.load(p_x + o_t[:, None] * stride_t + o_c[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _steps(p_delta, p_bias, o_c, o_t, sd_d, sd_t, m_c, m_t, SOFTPLUS: tl.constexpr):
    """The step sizes, and what softplus took; both 0 outside, where a step changes nothing."""
    mask = m_t[:, None] & m_c[None, :]
    b_raw = _load(p_delta, o_c, o_t, sd_d, sd_t, mask)
    if p_bias is not None:
        b_raw += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_delta = softplus(b_raw) if SOFTPLUS else b_raw
    return tl.where(mask, b_delta, 0.0), b_raw


@triton.jit
def _projection(p_x, o_c, o_t, n, stride_c, stride_n, stride_t, m_c, m_t, CONSTANT: tl.constexpr):
    """State n's B or C: (tokens, 1), or (1, channels) where it is constant."""
    if CONSTANT:
        b_x = tl.load(p_x + o_c * stride_c + n * stride_n, mask=m_c, other=0.0).to(tl.float32)[None, :]
    else:
        b_x = tl.load(p_x + n * stride_n + o_t * stride_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    return b_x


_UNSPECIALISED = ["length", "su_d", "su_t", "sd_d", "sd_t", "sz_d", "sz_t", "so_d", "so_t", "sg_d", "sg_t"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_out, p_states, p_last, length, dim, group_dim,
    su_b, su_d, su_t, sd_b, sd_d, sd_t, sz_b, sz_d, sz_t, sA_d, sA_n,
    sB_b, sB_c, sB_n, sB_t, sC_b, sC_c, sC_n, sC_t, sD_d, so_d, so_t,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
):  # fmt: skip
    """`h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t`, `out_t = (sum_n C_tn h_tn + D u_t) silu(z_t)`, chunk by chunk.

    Inside a chunk of BT tokens the recurrence of a state is one associative scan over (decay, input) pairs; the states
    stay in registers. `states` (batch, chunks, dim, N), where given, takes those entering the chunks and `out` nothing.
    B and C are (batch, groups, N, length), stride sB_c an axis of groups, or (dim, N), stride sB_c one of channels.
    Grid: (batch, groups, tiles of a group's channels).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(2) * BD + tl.arange(0, BD)
    m_c = o_r < group_dim
    o_c = i_g * group_dim + o_r
    o_n = tl.arange(0, BN)
    p_u += i_b * su_b
    p_delta += i_b * sd_b
    p_B += i_b * sB_b
    p_C += i_b * sC_b
    if not B_CONSTANT:
        p_B += i_g * sB_c
    if not C_CONSTANT:
        p_C += i_g * sC_c
    b_h = tl.zeros((BD, BN), tl.float32)
    m_h = m_c[:, None] & (o_n < N)[None, :]
    chunks = tl.cdiv(length, BT)
    for i_t in range(chunks):
        o_t = tl.arange(0, BT).to(tl.int64) + i_t * BT
        m_t = o_t < length
        mask = m_t[:, None] & m_c[None, :]
        if p_states is not None:
            o_s = (i_b * chunks + i_t) * dim * N
            tl.store(p_states + o_s + o_c[:, None] * N + o_n[None, :], b_h, mask=m_h)
        # (tokens, channels)
        b_u = _load(p_u, o_c, o_t, su_d, su_t, mask)
        b_delta, _ = _steps(p_delta, p_bias, o_c, o_t, sd_d, sd_t, m_c, m_t, SOFTPLUS)
        b_y = tl.zeros((BT, BD), tl.float32)
        for n in range(N):
            # (channels,); B and C (tokens, 1), or (1, channels) where they are constant
            b_A = tl.load(p_A + o_c * sA_d + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
            b_B = _projection(p_B, o_c, o_t, n, sB_c, sB_n, sB_t, m_c, m_t, B_CONSTANT)
            b_total, b_s = tl.associative_scan(
                (tl.exp2(b_delta * (b_A * LOG2_E)[None, :]), b_delta * b_u * b_B), 0, combine
            )
            b_s += b_total * (tl.sum(b_h, axis=1) if N == 1 else column(b_h, n))[None, :]
            if p_out is not None:
                b_y += b_s * _projection(p_C, o_c, o_t, n, sC_c, sC_n, sC_t, m_c, m_t, C_CONSTANT)
            b_end = row(b_s, BT - 1)
            b_h = b_end[:, None] if N == 1 else set_column(b_h, n, b_end)
        if p_out is not None:
            if p_D is not None:
                b_y += b_u * tl.load(p_D + o_c * sD_d, mask=m_c, other=0.0).to(tl.float32)[None, :]
            if p_z is not None:
                b_z = _load(p_z + i_b * sz_b, o_c, o_t, sz_d, sz_t, mask)
                b_y *= b_z * sigmoid(b_z)
            p_y = p_out + i_b * dim * length + o_t[:, None] * so_t + o_c[None, :] * so_d
            tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=mask)
    if p_last is not None:
        tl.store(p_last + i_b * dim * N + o_c[:, None] * N + o_n[None, :], b_h, mask=m_h)


@triton.jit
def _store_projection(p_grad, b_grad, b_sums, n, o_t, length, m_t, CONSTANT: tl.constexpr):
    """Store state n's gradient of B or C, summed over the tile's channels; add it up in `b_sums` where constant."""
    if CONSTANT:
        b_sums = set_column(b_sums, n, column(b_sums, n) + tl.sum(b_grad, axis=0))
    else:
        tl.store(p_grad + n * length.to(tl.int64) + o_t, tl.sum(b_grad, axis=1), mask=m_t)
    return b_sums


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_states, p_grad, p_grad_last,
    p_du, p_ddelta, p_dA, p_dB, p_dC, p_dD, p_dz, p_dbias, length, dim, group_dim,
    su_b, su_d, su_t, sd_b, sd_d, sd_t, sz_b, sz_d, sz_t, sg_b, sg_d, sg_t, sA_d, sA_n,
    sB_b, sB_c, sB_n, sB_t, sC_b, sC_c, sC_n, sC_t, sD_d, so_d, so_t,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
):  # fmt: skip
    """With `g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1)` the gradient of h_t, dy that of y before the gate:

        du_t = delta_t sum_n B_tn g_tn + D dy_t,  dB_t = sum_c delta_t u_t g_t,  dC_t = sum_c dy_t h_t,
        dA = sum_t delta_t r_t,  ddelta_t = sum_n A_n r_tn + u_t sum_n B_tn g_tn,  r_t = g_t exp(delta_t A) h_(t-1).

    From the last chunk to the first: states again from `states`, then `state_gradients`.

    Outputs: du, ddelta, dz (batch, dim, length); dA (batch, dim, N), dD and dbias (batch, dim) to be summed over the
    batch; dB and dC (tiles, batch, groups, N, length) to be summed over the tiles, or like dA where B or C is constant.
    Grid: (batch, groups, tiles of a group's channels).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    i_d = tl.program_id(2).to(tl.int64)
    o_r = i_d * BD + tl.arange(0, BD)
    m_c = o_r < group_dim
    o_c = i_g * group_dim + o_r
    o_n = tl.arange(0, BN)
    p_u += i_b * su_b
    p_delta += i_b * sd_b
    p_grad += i_b * sg_b
    p_B += i_b * sB_b
    p_C += i_b * sC_b
    o_part = ((i_d * tl.num_programs(0) + i_b) * tl.num_programs(1) + i_g) * N * length
    o_state = i_b * dim * N + o_c[:, None] * N + o_n[None, :]
    m_h = m_c[:, None] & (o_n < N)[None, :]
    if not B_CONSTANT:
        p_B += i_g * sB_c
        p_dB += o_part
    if not C_CONSTANT:
        p_C += i_g * sC_c
        p_dC += o_part
    # What flows into the states that leave the chunk.
    if p_grad_last is not None:
        # (channels, states)
        b_flow = tl.load(p_grad_last + o_state, mask=m_h, other=0.0)
    else:
        b_flow = tl.zeros((BD, BN), tl.float32)
    b_dA = tl.zeros((BD, BN), tl.float32)
    b_dB = tl.zeros((BD, BN), tl.float32)
    b_dC = tl.zeros((BD, BN), tl.float32)
    b_dD = tl.zeros((BD,), tl.float32)
    b_dbias = tl.zeros((BD,), tl.float32)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        i_t = chunks - 1 - step
        o_t = tl.arange(0, BT).to(tl.int64) + i_t * BT
        m_t = o_t < length
        mask = m_t[:, None] & m_c[None, :]
        # (tokens, channels)
        b_u = _load(p_u, o_c, o_t, su_d, su_t, mask)
        b_delta, b_raw = _steps(p_delta, p_bias, o_c, o_t, sd_d, sd_t, m_c, m_t, SOFTPLUS)
        b_dy = _load(p_grad, o_c, o_t, sg_d, sg_t, mask)
        if p_z is not None:
            b_z = _load(p_z + i_b * sz_b, o_c, o_t, sz_d, sz_t, mask)
            b_open = sigmoid(b_z)
            b_dz = b_dy * b_open * (1.0 + b_z * (1.0 - b_open))
            b_dy *= b_z * b_open
        b_y = tl.zeros((BT, BD), tl.float32)
        b_dx = tl.zeros((BT, BD), tl.float32)
        b_ddelta = tl.zeros((BT, BD), tl.float32)
        for n in range(N):
            # (channels,); B and C (tokens, 1), or (1, channels) where they are constant
            b_A = tl.load(p_A + o_c * sA_d + n * sA_n, mask=m_c, other=0.0).to(tl.float32)
            b_B = _projection(p_B, o_c, o_t, n, sB_c, sB_n, sB_t, m_c, m_t, B_CONSTANT)
            b_C = _projection(p_C, o_c, o_t, n, sC_c, sC_n, sC_t, m_c, m_t, C_CONSTANT)
            b_decay = tl.exp2(b_delta * (b_A * LOG2_E)[None, :])
            b_in = b_delta * b_u * b_B
            b_total, b_s = tl.associative_scan((b_decay, b_in), 0, combine)
            p_s = p_states + (i_b * chunks + i_t) * dim * N + o_c * N + n
            b_s += b_total * tl.load(p_s, mask=m_c, other=0.0)[None, :]
            if p_z is not None:
                b_y += b_s * b_C
            b_ds, b_end = state_gradients(b_decay, b_dy * b_C, column(b_flow, n))
            b_flow = set_column(b_flow, n, b_end)
            b_dB = _store_projection(p_dB, b_ds * b_delta * b_u, b_dB, n, o_t, length, m_t, B_CONSTANT)
            b_dC = _store_projection(p_dC, b_dy * b_s, b_dC, n, o_t, length, m_t, C_CONSTANT)
            b_dx += b_ds * b_B
            b_through = b_ds * (b_s - b_in)
            b_ddelta += b_through * b_A[None, :]
            b_dA = set_column(b_dA, n, column(b_dA, n) + tl.sum(b_through * b_delta, axis=0))
        b_du = b_dx * b_delta
        b_ddelta += b_dx * b_u
        if p_D is not None:
            b_D = tl.load(p_D + o_c * sD_d, mask=m_c, other=0.0).to(tl.float32)[None, :]
            b_du += b_dy * b_D
            b_y += b_u * b_D
            b_dD += tl.sum(b_dy * b_u, axis=0)
        if SOFTPLUS:
            b_ddelta *= sigmoid(b_raw)
        b_dbias += tl.sum(tl.where(mask, b_ddelta, 0.0), axis=0)
        o_out = i_b * dim * length + o_t[:, None] * so_t + o_c[None, :] * so_d
        tl.store(p_du + o_out, b_du.to(p_du.dtype.element_ty), mask=mask)
        tl.store(p_ddelta + o_out, b_ddelta.to(p_ddelta.dtype.element_ty), mask=mask)
        if p_z is not None:
            tl.store(p_dz + o_out, (b_dz * b_y).to(p_dz.dtype.element_ty), mask=mask)
    tl.store(p_dA + o_state, b_dA, mask=m_h)
    if B_CONSTANT:
        tl.store(p_dB + o_state, b_dB, mask=m_h)
    if C_CONSTANT:
        tl.store(p_dC + o_state, b_dC, mask=m_h)
    if p_dD is not None:
        tl.store(p_dD + i_b * dim + o_c, b_dD, mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + i_b * dim + o_c, b_dbias, mask=m_c)
