"""The Triton kernels of the selective scan; `triton.py` launches them and says how they work together.

A program has R x W channels: a thread's R channels lie in its registers, and each of the W warps has its own. A chunk
is LANES x 8 tokens, eight of them side by side in a lane: one access of 16 bytes in half precision. So a warp reads B
and C of a chunk once for R channels, and a recurrence crosses lanes once in eight tokens.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s.<tensor>[axis].
"""

from typing import NamedTuple

import triton
import triton.language as tl

from visionmix.kernels.triton_products import LOG2_E


class Strides(NamedTuple):
    """Strides of u, delta, z (batch, dim), A (dim, N), B, C (batch, groups, N) and D (dim,); 0 for what is not given.

    Constant B and C have (0, dim, N).
    """

    u: tuple[int, int]
    delta: tuple[int, int]
    z: tuple[int, int]
    A: tuple[int, int]
    B: tuple[int, int, int]
    C: tuple[int, int, int]
    D: tuple[int]


class Constants(NamedTuple):
    """Constants of a problem: N states, tiles of R x W channels and LANES x 8 tokens, and which options it has."""

    N: int
    R: int
    W: int
    LANES: int
    SOFTPLUS: bool
    B_CONSTANT: bool
    C_CONSTANT: bool


@triton.jit
def combine(a_first, b_first, a_second, b_second):
    """The composition of two steps `h -> a h + b`, the first one first."""
    return a_first * a_second, a_second * b_first + b_second


@triton.jit
def softplus(b_x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), exact to float32 for small results too.

    log(1 + e) is e times a polynomial of relative error 3e-8: no division and no logarithm.
    """
    b_e = tl.exp2(-tl.abs(b_x) * LOG2_E)
    b_p = -0.0295052268 + b_e * 0.0052326913
    b_p = 0.191060066 + b_e * (-0.136632442 + b_e * (0.078225933 + b_e * b_p))
    b_p = 0.99999994 + b_e * (-0.499994934 + b_e * (0.333190978 + b_e * (-0.24842982 + b_e * b_p)))
    return tl.maximum(b_x, 0.0) + b_e * b_p


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)), without overflow."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def _channels(group_dim, R: tl.constexpr, W: tl.constexpr):
    """The program's channels (R, W, 1) in the group and in all, and which of them there are."""
    o_r = tl.program_id(2) * (R * W) + tl.arange(0, R)[:, None, None] * W + tl.arange(0, W)[None, :, None]
    return tl.program_id(1).to(tl.int64) * group_dim + o_r, o_r < group_dim


@triton.jit
def _tokens(LANES: tl.constexpr):
    """A chunk's tokens (1, 1, LANES, 8)."""
    return (tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, None, :, :]


@triton.jit
def _eights(x):
    """A multiple of 8, so that the compiler sees it: it then reads eight tokens at once."""
    return x // 8 * 8


@triton.jit
def _split(b_x):
    """The eight tokens of a lane, (R, W, LANES, 8) to a tuple of (R, W, LANES): registers by other names."""
    R: tl.constexpr = b_x.shape[0]
    W: tl.constexpr = b_x.shape[1]
    LANES: tl.constexpr = b_x.shape[2]
    even, odd = tl.split(tl.reshape(b_x, (R, W, LANES, 4, 2)))
    b_04, b_26 = tl.split(tl.reshape(even, (R, W, LANES, 2, 2)))
    b_15, b_37 = tl.split(tl.reshape(odd, (R, W, LANES, 2, 2)))
    b_0, b_4 = tl.split(b_04)
    b_1, b_5 = tl.split(b_15)
    b_2, b_6 = tl.split(b_26)
    b_3, b_7 = tl.split(b_37)
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def _join(b_x):
    """Undo `_split`."""
    R: tl.constexpr = b_x[0].shape[0]
    W: tl.constexpr = b_x[0].shape[1]
    LANES: tl.constexpr = b_x[0].shape[2]
    even = tl.reshape(tl.join(tl.join(b_x[0], b_x[4]), tl.join(b_x[2], b_x[6])), (R, W, LANES, 4))
    odd = tl.reshape(tl.join(tl.join(b_x[1], b_x[5]), tl.join(b_x[3], b_x[7])), (R, W, LANES, 4))
    return tl.reshape(tl.join(even, odd), (R, W, LANES, 8))


@triton.jit
def _decays(b_delta, b_A):
    """exp(delta_t A) for each token; A is log2 e times the rate."""
    out = (tl.exp2(b_delta[0] * b_A),)
    for i in tl.static_range(1, 8):
        out += (tl.exp2(b_delta[i] * b_A),)
    return out


@triton.jit
def _products(b_x, b_y):
    """x_t y_t for each token."""
    out = (b_x[0] * b_y[0],)
    for i in tl.static_range(1, 8):
        out += (b_x[i] * b_y[i],)
    return out


@triton.jit
def _add_products(b_sum, b_x, b_y):
    """sum_t + x_t y_t for each token."""
    out = (b_sum[0] + b_x[0] * b_y[0],)
    for i in tl.static_range(1, 8):
        out += (b_sum[i] + b_x[i] * b_y[i],)
    return out


@triton.jit
def _total(b_x):
    """The sum over a lane's tokens."""
    return ((b_x[0] + b_x[1]) + (b_x[2] + b_x[3])) + ((b_x[4] + b_x[5]) + (b_x[6] + b_x[7]))


@triton.jit
def _states(b_decay, b_in, b_h):
    """`h_t = decay_t h_(t-1) + in_t` through a lane's tokens, from what enters it."""
    b_h = b_decay[0] * b_h + b_in[0]
    out = (b_h,)
    for i in tl.static_range(1, 8):
        b_h = b_decay[i] * b_h + b_in[i]
        out += (b_h,)
    return out


@triton.jit
def _state_gradients(b_decay, b_direct, b_flow):
    """`dh_t = direct_t + decay_(t+1) dh_(t+1)` from a lane's last token to its first, and what flows out of that.

    `flow` is what flows into the last.
    """
    b_g = b_direct[7] + b_flow
    out = (b_g,)
    for i in tl.static_range(1, 8):
        b_g = b_decay[8 - i] * b_g + b_direct[7 - i]
        out = (b_g,) + out  # noqa: RUF005  Triton does not know the star
    return out, b_decay[0] * b_g


@triton.jit
def _enter(b_decay, b_end, b_h):
    """The states that enter the lanes, and the one that leaves the last (R, W, 1); `h` (R, W, 1) enters the first.

    A lane makes `end` of a state of 0, and lets `decay` of what enters it through; both are (R, W, LANES).
    """
    LANES: tl.constexpr = b_end.shape[2]
    o_l = tl.arange(0, LANES)[None, None, :]
    b_end = tl.where(o_l == 0, b_decay * b_h + b_end, b_end)
    _, b_s = tl.associative_scan((b_decay, b_end), 2, combine)
    b_out = tl.sum(tl.where(o_l == LANES - 1, b_s, 0.0), axis=2, keep_dims=True)
    o_before = tl.maximum(o_l - 1, 0) + tl.zeros(b_s.shape, tl.int32)
    return tl.where(o_l == 0, b_h, tl.gather(b_s, o_before, 2)), b_out


@triton.jit
def _enter_backward(b_decay, b_g, b_flow):
    """`_enter` from the last lane to the first: the forward scan of the lanes in a mirror."""
    LANES: tl.constexpr = b_g.shape[2]
    o_l = tl.arange(0, LANES)[None, None, :]
    o_mirror = LANES - 1 - o_l + tl.zeros(b_g.shape, tl.int32)
    b_in, b_out = _enter(tl.gather(b_decay, o_mirror, 2), tl.gather(b_g, o_mirror, 2), b_flow)
    return tl.gather(b_in, o_mirror, 2), b_out


@triton.jit
def _group(p_x, i_b, i_g, s, CONSTANT: tl.constexpr):
    """B or C of the program's image and group, and the stride of its states."""
    if CONSTANT:
        return p_x, s[2]
    else:
        return p_x + i_b * _eights(s[0]) + i_g * _eights(s[1]), _eights(s[2])


@triton.jit
def _load(p_x, i_b, o_c, o_first, o_t, s, mask):
    """A (R, W, LANES, 8) tile in float32, 0 outside."""
    o_row = i_b * _eights(s[0]) + o_c * _eights(s[1]) + o_first
    return tl.load(p_x + o_row[:, :, :, None] + o_t, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _steps(p_delta, b_bias, i_b, o_c, o_first, o_t, s, length, mask, SOFTPLUS: tl.constexpr):
    """The step sizes, 0 after the last token, where a step changes nothing, and what softplus took."""
    b_raw = _load(p_delta, i_b, o_c, o_first, o_t, s, mask) + b_bias
    b_delta = softplus(b_raw) if SOFTPLUS else b_raw
    return tl.where(o_t < (length - o_first).to(tl.int32), b_delta, 0.0), b_raw


@triton.jit
def _vector(p_x, o_c, m_c, stride):
    """One number a channel, (R, W, 1, 1); 0 where there is no such tensor."""
    if p_x is None:
        b_x = tl.zeros(o_c.shape, tl.float32)
    else:
        b_x = tl.load(p_x + o_c * stride, mask=m_c, other=0.0).to(tl.float32)
    return b_x[:, :, :, None]


@triton.jit
def _skip(p_D, b_u, b_D):
    """D u, 0 where there is no D, whatever u is."""
    return tl.zeros(b_u.shape, tl.float32) if p_D is None else b_u * b_D


@triton.jit
def _projection(p_x, o_c, o_first, o_t, m_c, m_t, stride_c, W: tl.constexpr, CONSTANT: tl.constexpr):
    """A state's B or C by token: eight of (1, W, LANES), the same for each warp, or of (R, W, 1) where constant."""
    if CONSTANT:
        b_x = tl.load(p_x + o_c * stride_c, mask=m_c, other=0.0).to(tl.float32)
        return b_x, b_x, b_x, b_x, b_x, b_x, b_x, b_x
    else:
        o_w = tl.arange(0, W)[None, :, None, None] * 0
        # The axis of warps is made part of the mask, so that the tile is loaded in the layout it is used in.
        return _split(tl.load(p_x + o_first + (o_w + o_t), mask=m_t & (o_w == 0), other=0.0).to(tl.float32))


@triton.jit
def _program(p_B, p_C, p_D, p_bias, group_dim, s, K: tl.constexpr):
    """The program's place, B and C with the strides of their states, the bias and D."""
    i_b = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    o_c, m_c = _channels(group_dim, K.R, K.W)
    B = _group(p_B, i_b, i_g, s.B, K.B_CONSTANT)
    C = _group(p_C, i_b, i_g, s.C, K.C_CONSTANT)
    return (i_b, o_c, m_c, _tokens(K.LANES)), B, C, _vector(p_bias, o_c, m_c, 1), _vector(p_D, o_c, m_c, s.D[0])


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_out, p_states, length, dim, group_dim, s, K: tl.constexpr
):  # fmt: skip
    """`h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t`, `out_t = (sum_n C_tn h_tn + D u_t) silu(z_t)`, chunk by chunk.

    `states` (batch, chunks + 1, N, dim) takes the states entering the chunks, and the last. A program reads there what
    it wrote a chunk before. Where no `out` is given, C, D and z are not read.
    u, delta and z are (batch, dim, length), as is out; B and C (batch, groups, N, length), or (dim, N) where constant.
    Tokens lie side by side; rows begin at multiples of 8 and go on to one with zeros.
    Grid: (batch, groups, tiles of a group's channels).
    """
    (i_b, o_c, m_c, o_t), (p_B, sB_n), (p_C, sC_n), b_bias, b_D = _program(p_B, p_C, p_D, p_bias, group_dim, s, K)
    T: tl.constexpr = K.LANES * 8
    chunks = tl.cdiv(length, T).to(tl.int64)
    p_h = p_states + i_b * (chunks + 1) * K.N * dim + o_c
    for n in range(K.N):
        tl.store(p_h + n * dim, tl.zeros((K.R, K.W, 1), tl.float32), mask=m_c)
    for i_t in range(chunks):
        tl.debug_barrier()
        o_first = i_t * T
        m_t = o_t < (_eights(length + 7) - o_first).to(tl.int32)
        mask = m_c[:, :, :, None] & m_t
        # (R, W, LANES, 8)
        b_u = _load(p_u, i_b, o_c, o_first, o_t, s.u, mask)
        b_delta, _ = _steps(p_delta, b_bias, i_b, o_c, o_first, o_t, s.delta, length, mask, K.SOFTPLUS)
        b_steps, b_x, b_y = _split(b_delta), _split(b_delta * b_u), _split(_skip(p_D, b_u, b_D))
        b_sum = _total(b_steps)
        for n in range(K.N):
            # (R, W, 1); B and C by token
            b_h = tl.load(p_h + n * dim, mask=m_c, other=0.0)
            b_A = tl.load(p_A + o_c * s.A[0] + n * s.A[1], mask=m_c, other=0.0).to(tl.float32) * LOG2_E
            b_B = _projection(p_B + n * sB_n, o_c, o_first, o_t, m_c, m_t, s.B[1], K.W, K.B_CONSTANT)
            b_decay, b_in = _decays(b_steps, b_A), _products(b_x, b_B)
            b_end = _states(b_decay, b_in, tl.zeros(b_sum.shape, tl.float32))
            b_enter, b_leave = _enter(tl.exp2(b_sum * b_A), b_end[7], b_h)
            tl.store(p_h + (K.N + n) * dim, b_leave, mask=m_c)
            if p_out is not None:
                b_C = _projection(p_C + n * sC_n, o_c, o_first, o_t, m_c, m_t, s.C[1], K.W, K.C_CONSTANT)
                b_y = _add_products(b_y, _states(b_decay, b_in, b_enter), b_C)
        p_h += K.N * dim
        if p_out is not None:
            b_out = _join(b_y)
            if p_z is not None:
                b_z = _load(p_z, i_b, o_c, o_first, o_t, s.z, mask)
                b_out *= b_z * sigmoid(b_z)
            o_out = (i_b * dim + o_c) * _eights(length + 7) + o_first
            tl.store(
                p_out + o_out[:, :, :, None] + o_t,
                b_out.to(p_out.dtype.element_ty),
                mask=mask,
            )


@triton.jit
def _add_to(p_sum, b_x, mask):
    """Add to what this program alone sums."""
    tl.store(p_sum, tl.load(p_sum, mask=mask, other=0.0) + b_x, mask=mask)


@triton.jit
def _projection_gradient(p_sum, p_grad, b_x, o_t, m_c, m_t, CONSTANT: tl.constexpr):
    """Store a state's gradient of B or C, summed over the program's channels; where constant, add it up over tokens."""
    if CONSTANT:
        _add_to(p_sum, tl.sum(_total(b_x), axis=2, keep_dims=True), m_c)
    else:
        b_grad = tl.sum(tl.sum(_join(b_x), axis=0, keep_dims=True), axis=1, keep_dims=True)
        tl.store(p_grad + o_t, b_grad, mask=m_t)


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_states, p_grad, p_flow,
    p_du, p_ddelta, p_dA, p_dB, p_dC, p_dD, p_dz, p_dbias, length, dim, group_dim, s, s_grad, K: tl.constexpr
):  # fmt: skip
    """With `g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1)` the gradient of h_t, dy that of y before the gate:

        du_t = delta_t sum_n B_tn g_tn + D dy_t,  dB_t = sum_c delta_t u_t g_t,  dC_t = sum_c dy_t h_t,
        dA = sum_t delta_t r_t,  ddelta_t = sum_n A_n r_tn + u_t sum_n B_tn g_tn,  r_t = g_t exp(delta_t A) h_(t-1).

    From the last chunk to the first, from the states that `forward_kernel` left. `flow` (batch, N, dim) holds the
    gradient of the last state, and from then on what flows into the chunk before; dA (batch, N, dim), zeros at first,
    is added up in place.

    Outputs: du, ddelta, dz in rows as out; dA, dD and dbias (batch, dim) to be summed over the batch; dB and dC
    (tiles, batch, groups, N, length), in rows, to be summed over the tiles, or like dA where B or C is constant.
    Grid: (batch, groups, tiles of a group's channels).
    """
    (i_b, o_c, m_c, o_t), (p_B, sB_n), (p_C, sC_n), b_bias, b_D = _program(p_B, p_C, p_D, p_bias, group_dim, s, K)
    T: tl.constexpr = K.LANES * 8
    chunks = tl.cdiv(length, T).to(tl.int64)
    i_part = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + i_b) * tl.num_programs(1) + tl.program_id(1)
    o_sum = i_b * K.N * dim + o_c
    p_h = p_states + (i_b * (chunks + 1) + chunks) * K.N * dim + o_c
    b_dD = tl.zeros((K.R, K.W, K.LANES), tl.float32)
    b_dbias = tl.zeros((K.R, K.W, K.LANES), tl.float32)
    for step in range(chunks):
        tl.debug_barrier()
        i_t = chunks - 1 - step
        o_first = i_t * T
        p_h -= K.N * dim
        m_t = o_t < (_eights(length + 7) - o_first).to(tl.int32)
        mask = m_c[:, :, :, None] & m_t
        # (R, W, LANES, 8)
        b_u = _load(p_u, i_b, o_c, o_first, o_t, s.u, mask)
        b_delta, b_raw = _steps(p_delta, b_bias, i_b, o_c, o_first, o_t, s.delta, length, mask, K.SOFTPLUS)
        b_dy = _load(p_grad, i_b, o_c, o_first, o_t, s_grad, mask)
        if p_z is not None:
            b_z = _load(p_z, i_b, o_c, o_first, o_t, s.z, mask)
            b_dy *= b_z * sigmoid(b_z)
        b_steps, b_x, b_direct, b_y = _split(b_delta), _split(b_delta * b_u), _split(b_dy), _split(_skip(p_D, b_u, b_D))
        b_zero = tl.zeros((K.R, K.W, K.LANES), tl.float32)
        b_dx = (b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero)
        b_dsteps = b_dx
        b_sum = _total(b_steps)
        for n in range(K.N):
            # (R, W, 1); B and C by token
            b_h = tl.load(p_h + n * dim, mask=m_c, other=0.0)
            b_flow = tl.load(p_flow + o_sum + n * dim, mask=m_c, other=0.0)
            b_A = tl.load(p_A + o_c * s.A[0] + n * s.A[1], mask=m_c, other=0.0).to(tl.float32)
            b_B = _projection(p_B + n * sB_n, o_c, o_first, o_t, m_c, m_t, s.B[1], K.W, K.B_CONSTANT)
            b_decay, b_in = _decays(b_steps, b_A * LOG2_E), _products(b_x, b_B)
            b_lane = tl.exp2(b_sum * (b_A * LOG2_E))
            b_end = _states(b_decay, b_in, b_zero)
            b_enter, _ = _enter(b_lane, b_end[7], b_h)
            b_s = _states(b_decay, b_in, b_enter)
            o_grad = (i_part * K.N + n) * _eights(length + 7) + o_first
            _projection_gradient(
                p_dC + o_sum + n * dim, p_dC + o_grad, _products(b_direct, b_s), o_t, m_c, m_t, K.C_CONSTANT
            )
            # Read as late as that, since registers are few.
            b_C = _projection(p_C + n * sC_n, o_c, o_first, o_t, m_c, m_t, s.C[1], K.W, K.C_CONSTANT)
            if p_z is not None:
                b_y = _add_products(b_y, b_s, b_C)
            b_dy_C = _products(b_direct, b_C)
            _, b_g = _state_gradients(b_decay, b_dy_C, b_zero)
            b_from, b_leave = _enter_backward(b_lane, b_g, b_flow)
            b_ds, _ = _state_gradients(b_decay, b_dy_C, b_from)
            tl.store(p_flow + o_sum + n * dim, b_leave, mask=m_c)
            _projection_gradient(
                p_dB + o_sum + n * dim, p_dB + o_grad, _products(b_ds, b_x), o_t, m_c, m_t, K.B_CONSTANT
            )
            b_dx = _add_products(b_dx, b_ds, b_B)
            # The decayed part of a state is the state without the step's own input.
            b_through = (b_ds[0] * (b_s[0] - b_in[0]),)
            for i in tl.static_range(1, 8):
                b_through += (b_ds[i] * (b_s[i] - b_in[i]),)
            b_dsteps = _add_products(b_dsteps, b_through, (b_A, b_A, b_A, b_A, b_A, b_A, b_A, b_A))
            b_dA = tl.sum(_total(_products(b_through, b_steps)), axis=2, keep_dims=True)
            _add_to(p_dA + o_sum + n * dim, b_dA, m_c)
        # (R, W, LANES, 8), loaded again: registers hold no more than the states' loop needs.
        b_dx, b_dsteps = _join(b_dx), _join(b_dsteps)
        b_u = _load(p_u, i_b, o_c, o_first, o_t, s.u, mask)
        b_delta, b_raw = _steps(p_delta, b_bias, i_b, o_c, o_first, o_t, s.delta, length, mask, K.SOFTPLUS)
        b_dy = _load(p_grad, i_b, o_c, o_first, o_t, s_grad, mask)
        o_out = ((i_b * dim + o_c) * _eights(length + 7) + o_first)[:, :, :, None] + o_t
        if p_z is not None:
            b_z = _load(p_z, i_b, o_c, o_first, o_t, s.z, mask)
            b_open = sigmoid(b_z)
            b_dz = b_dy * b_open * (1.0 + b_z * (1.0 - b_open)) * _join(b_y)
            tl.store(p_dz + o_out, b_dz.to(p_dz.dtype.element_ty), mask=mask)
            b_dy *= b_z * b_open
        b_ddelta = b_dsteps + b_dx * b_u
        if K.SOFTPLUS:
            b_ddelta *= sigmoid(b_raw)
        b_ddelta = tl.where(o_t < (length - o_first).to(tl.int32), b_ddelta, 0.0)
        b_dbias += tl.sum(b_ddelta, axis=3)
        b_dD += tl.sum(b_dy * b_u, axis=3)
        tl.store(p_du + o_out, (b_dx * b_delta + b_dy * b_D).to(p_du.dtype.element_ty), mask=mask)
        tl.store(p_ddelta + o_out, b_ddelta.to(p_ddelta.dtype.element_ty), mask=mask)
    if p_dD is not None:
        tl.store(p_dD + i_b * dim + o_c, tl.sum(b_dD, axis=2, keep_dims=True), mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + i_b * dim + o_c, tl.sum(b_dbias, axis=2, keep_dims=True), mask=m_c)
