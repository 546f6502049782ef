"""The Triton kernels of gated linear attention; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s<tensor>_<axis>.
"""

import triton
import triton.language as tl

# Tokens whose decays among each other are running products.
BLOCK = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(p_x, o_t, o_d, stride_t, stride_d, m_t, SIZE: tl.constexpr):
    """A (tokens, SIZE) tile in float32, 0 outside."""
    mask = m_t[:, None] & (o_d < SIZE)[None, :]
    return tl.load(p_x + o_t[:, None] * stride_t + o_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p_x, b_x, o_t, o_d, stride_t, stride_d, m_t, SIZE: tl.constexpr):
    mask = m_t[:, None] & (o_d < SIZE)[None, :]
    tl.store(p_x + o_t[:, None] * stride_t + o_d[None, :] * stride_d, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _sums(b_x, SEGMENT: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive cumulative sums over the tokens of each segment of SEGMENT; from the segment's end with REVERSE."""
    ROWS: tl.constexpr = b_x.shape[0]
    WIDTH: tl.constexpr = b_x.shape[1]
    if SEGMENT == ROWS:
        b_sum = tl.cumsum(b_x, axis=0, reverse=REVERSE)
    else:
        b_cut = tl.reshape(b_x, (ROWS // SEGMENT, SEGMENT, WIDTH))
        b_sum = tl.reshape(tl.cumsum(b_cut, axis=1, reverse=REVERSE), (ROWS, WIDTH))
    return b_sum


@triton.jit
def _query_decay(b_g, SEGMENT: tl.constexpr, REVERSE: tl.constexpr):
    """The decay from the start of each segment to the token, its own gate included; `b_g` times log2(e)."""
    return tl.exp2(_sums(b_g, SEGMENT, REVERSE))


@triton.jit
def _key_decay(b_next, SEGMENT: tl.constexpr, REVERSE: tl.constexpr):
    """The decay from the token, its own gate left out, to the segment's end; `b_next` are the following gates."""
    ROWS: tl.constexpr = b_next.shape[0]
    o_r = tl.arange(0, ROWS) % SEGMENT
    b_inside = tl.where((o_r == (0 if REVERSE else SEGMENT - 1))[:, None], 0.0, b_next)
    return tl.exp2(_sums(b_inside, SEGMENT, not REVERSE))


@triton.jit
def _pairs(CHUNK: tl.constexpr, SEGMENT: tl.constexpr, REVERSE: tl.constexpr):
    """(CHUNK, CHUNK): whether row and column lie in the later and the earlier one of a pair of segments."""
    o_i = tl.arange(0, CHUNK)[:, None]
    o_j = tl.arange(0, CHUNK)[None, :]
    same = (o_i // (2 * SEGMENT)) == (o_j // (2 * SEGMENT))
    o_a, o_b = o_i // SEGMENT, o_j // SEGMENT
    return same & (o_a < o_b if REVERSE else o_a > o_b)


@triton.jit
def _next_gates(p_g, o_t, o_d, stride_t, stride_d, length, DK: tl.constexpr, REVERSE: tl.constexpr):
    """The gates that follow each token in the direction's time, times log2(e)."""
    o_n = o_t - 1 if REVERSE else o_t + 1
    return _load(p_g, o_n, o_d, stride_t, stride_d, (o_n >= 0) & (o_n < length), DK) * LOG2_E


@triton.jit
def _diagonal(b_x):
    """The diagonal blocks of a (CHUNK, CHUNK) tile, side by side: (CHUNK, BLOCK)."""
    CHUNK: tl.constexpr = b_x.shape[0]
    o_r = tl.arange(0, CHUNK)
    b_own = tl.where((o_r // BLOCK)[:, None] == (o_r // BLOCK)[None, :], b_x, 0.0)
    return tl.sum(tl.reshape(b_own, (CHUNK, CHUNK // BLOCK, BLOCK)), axis=1)


@triton.jit
def _from_diagonal(b_x):
    """Undo `_diagonal`; zeros outside the diagonal blocks."""
    CHUNK: tl.constexpr = b_x.shape[0]
    o_r = tl.arange(0, CHUNK)
    b_all = tl.broadcast_to(b_x[:, None, :], (CHUNK, CHUNK // BLOCK, BLOCK))
    m_own = (o_r // BLOCK)[:, None] == (o_r // BLOCK)[None, :]
    return tl.where(m_own, tl.reshape(b_all, (CHUNK, CHUNK)), 0.0)


@triton.jit
def _column(b_x, i):
    """Column number i of a tile."""
    return tl.sum(tl.where((tl.arange(0, b_x.shape[1]) == i)[None, :], b_x, 0.0), axis=1)


@triton.jit
def _segment_weights(
    b_w, b_q, b_k, b_g, b_n, SEGMENT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add the weights of each odd segment's queries for the keys of the segment before it."""
    b_late = b_q * _query_decay(b_g, SEGMENT, REVERSE)
    b_early = b_k * _key_decay(b_n, SEGMENT, REVERSE)
    b_dot = tl.dot(b_late, tl.trans(b_early), input_precision=PRECISION)
    return b_w + tl.where(_pairs(b_w.shape[0], SEGMENT, REVERSE), b_dot, 0.0)


@triton.jit
def _segment_gradients(
    b_dq, b_dk, b_dw, b_q, b_k, b_g, b_n,
    SEGMENT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of q and k from those weights."""
    b_pairs = tl.where(_pairs(b_dw.shape[0], SEGMENT, REVERSE), b_dw, 0.0)
    b_late = _query_decay(b_g, SEGMENT, REVERSE)
    b_early = _key_decay(b_n, SEGMENT, REVERSE)
    b_dq += b_late * tl.dot(b_pairs, b_k * b_early, input_precision=PRECISION)
    b_dk += b_early * tl.dot(tl.trans(b_pairs), b_q * b_late, input_precision=PRECISION)
    return b_dq, b_dk


@triton.jit
def _weights(
    b_w, p_q, p_k, p_g, o_t, length, sq_t, sq_d, sk_t, sk_d, sg_t, sg_d,
    DK: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `b_w` (CHUNK, CHUNK) the weight of each query (row) for each key (column) of a chunk, in one direction."""
    m_t = o_t < length
    o_r = tl.arange(0, CHUNK) % BLOCK
    # Rows are keys here, columns the queries of the key's block.
    b_near = tl.zeros((CHUNK, BLOCK), tl.float32)
    for o_k in range(0, DK, BK):
        o_d = o_k + tl.arange(0, BK)
        b_k = _load(p_k, o_t, o_d, sk_t, sk_d, m_t, DK)
        # The keys of each block, decayed step by step to the block's query number i.
        b_p = tl.zeros((CHUNK, BK), tl.float32)
        for step in range(BLOCK):
            i = BLOCK - 1 - step if REVERSE else step
            o_i = o_t - o_r + i
            m_i = o_i < length
            b_a = tl.exp2(_load(p_g, o_i, o_d, sg_t, sg_d, m_i, DK) * LOG2_E)
            b_q = _load(p_q, o_i, o_d, sq_t, sq_d, m_i, DK)
            b_p = tl.where((o_r == i)[:, None], b_k, b_p * b_a)
            b_row = tl.sum(b_p * b_q, axis=1)
            b_near += tl.where((tl.arange(0, BLOCK) == i)[None, :], b_row[:, None], 0.0)
        if CHUNK > BLOCK:
            b_q = _load(p_q, o_t, o_d, sq_t, sq_d, m_t, DK)
            b_g = _load(p_g, o_t, o_d, sg_t, sg_d, m_t, DK) * LOG2_E
            b_n = _next_gates(p_g, o_t, o_d, sg_t, sg_d, length, DK, REVERSE)
            b_w = _segment_weights(b_w, b_q, b_k, b_g, b_n, BLOCK, REVERSE, PRECISION)
            if CHUNK > 2 * BLOCK:
                b_w = _segment_weights(b_w, b_q, b_k, b_g, b_n, 2 * BLOCK, REVERSE, PRECISION)
    return b_w + tl.trans(_from_diagonal(b_near))


@triton.jit(do_not_specialize=["length"])
def states_kernel(
    p_x, p_y, p_g, p_first, p_states, p_last, scale, length, heads,
    sx_b, sx_t, sx_h, sx_d, sy_b, sy_t, sy_h, sy_d, sg_b, sg_t, sg_h, sg_d,
    DK: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOWN: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`S <- diag(decay of the chunk) S + sum_t (scale x_t decay_t)^T y_t` over the chunks, upwards or DOWN.

    x = k, y = v with KEYS (decayed to the chunk's far end), x = q, y = grad_out without (decayed from its near end).
    Writes the S before each chunk to `states` (batch x heads, chunks, DK, DV), unless there is one chunk, and the S
    after all of them to `last`.
    Grid: (batch x heads, tiles of DK, tiles of DV).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // heads, i_row % heads
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    p_x += i_b * sx_b + i_h * sx_h
    p_y += i_b * sy_b + i_h * sy_h
    p_g += i_b * sg_b + i_h * sg_h
    o_s = o_k.to(tl.int64)[:, None] * DV + o_v[None, :]
    m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
    if p_first is not None:
        b_s = tl.load(p_first + i_row * DK * DV + o_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros((BK, BV), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        i_c = chunks - 1 - step if DOWN else step
        if p_states is not None:
            tl.store(p_states + (i_row * chunks + i_c) * DK * DV + o_s, b_s, mask=m_s)
        o_t = tl.arange(0, CHUNK).to(tl.int64) + i_c * CHUNK
        m_t = o_t < length
        # (tokens, BK), (tokens, BV) and (tokens, BK)
        b_x = _load(p_x, o_t, o_k, sx_t, sx_d, m_t, DK)
        b_y = _load(p_y, o_t, o_v, sy_t, sy_d, m_t, DV)
        b_g = _load(p_g, o_t, o_k, sg_t, sg_d, m_t, DK) * LOG2_E
        if KEYS:
            b_decay = _key_decay(_next_gates(p_g, o_t, o_k, sg_t, sg_d, length, DK, DOWN), CHUNK, DOWN)
        else:
            # The gradient of the states walks against the direction's time.
            b_decay = _query_decay(b_g, CHUNK, not DOWN)
        b_total = tl.exp2(tl.sum(b_g, axis=0))
        b_s = b_s * b_total[:, None] + tl.dot(tl.trans(b_x * b_decay * scale), b_y, input_precision=PRECISION)
    if p_last is not None:
        tl.store(p_last + i_row * DK * DV + o_s, b_s.to(p_last.dtype.element_ty), mask=m_s)


@triton.jit
def _from_states(
    b_out, p_x, p_g, p_states, o_t, o_v, length, sx_t, sx_d, sg_t, sg_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `(x decay) S`, the decay between the token and the chunk's end that S belongs to."""
    m_t = o_t < length
    for o_k in range(0, DK, BK):
        o_d = o_k + tl.arange(0, BK)
        b_x = _load(p_x, o_t, o_d, sx_t, sx_d, m_t, DK)
        if KEYS:
            b_decay = _key_decay(_next_gates(p_g, o_t, o_d, sg_t, sg_d, length, DK, REVERSE), CHUNK, REVERSE)
        else:
            b_decay = _query_decay(_load(p_g, o_t, o_d, sg_t, sg_d, m_t, DK) * LOG2_E, CHUNK, REVERSE)
        b_s = _load(p_states, o_d.to(tl.int64), o_v, DV, 1, o_d < DK, DV)
        b_out += tl.dot(b_x * b_decay, b_s, input_precision=PRECISION)
    return b_out


@triton.jit(do_not_specialize=["length"])
def mix_kernel(
    p_q, p_k, p_y, p_g, p_g2, p_states, p_states2, p_out, scale, length, heads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_h, sk_d, sy_b, sy_t, sy_h, sy_d,
    sg_b, sg_t, sg_h, sg_d, sg2_b, sg2_t, sg2_h, sg2_d, so_b, so_t, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out = scale (W y + (q decay) S)`, W the weights of a chunk's queries for its keys, y = v.

    TRANSPOSED: the gradient of v, `out = scale W^T y + (k decay) S`, y = grad_out and S the gradients of the states.
    With `g2`, the gates of the other direction, both directions' terms are added up.
    Grid: (batch x heads, chunks).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // heads, i_row % heads
    i_c = tl.program_id(1).to(tl.int64)
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    p_q += i_b * sq_b + i_h * sq_h
    p_k += i_b * sk_b + i_h * sk_h
    p_y += i_b * sy_b + i_h * sy_h
    p_g += i_b * sg_b + i_h * sg_h
    p_out += i_b * so_b + i_h * so_h
    b_w = tl.zeros((CHUNK, CHUNK), tl.float32)
    b_w = _weights(b_w, p_q, p_k, p_g, o_t, length, sq_t, sq_d, sk_t, sk_d, sg_t, sg_d, DK, BK, CHUNK, False, PRECISION)
    if p_g2 is not None:
        p_g2 += i_b * sg2_b + i_h * sg2_h
        b_w = _weights(
            b_w, p_q, p_k, p_g2, o_t, length, sq_t, sq_d, sk_t, sk_d, sg2_t, sg2_d, DK, BK, CHUNK, True, PRECISION
        )
    if TRANSPOSED:
        b_w = tl.trans(b_w)
        p_x, sx_t, sx_d = p_k, sk_t, sk_d
    else:
        p_x, sx_t, sx_d = p_q, sq_t, sq_d
    i_s = (i_row * tl.num_programs(1) + i_c) * DK * DV
    for o_tile in range(0, DV, BV):
        o_v = o_tile + tl.arange(0, BV)
        b_out = tl.dot(b_w, _load(p_y, o_t, o_v, sy_t, sy_d, o_t < length, DV), input_precision=PRECISION)
        if TRANSPOSED:
            b_out *= scale
        if p_states is not None:
            b_out = _from_states(
                b_out, p_x, p_g, p_states + i_s, o_t, o_v, length, sx_t, sx_d, sg_t, sg_d,
                DK, DV, BK, CHUNK, TRANSPOSED, False, PRECISION,
            )  # fmt: skip
        if p_states2 is not None:
            b_out = _from_states(
                b_out, p_x, p_g2, p_states2 + i_s, o_t, o_v, length, sx_t, sx_d, sg2_t, sg2_d,
                DK, DV, BK, CHUNK, TRANSPOSED, True, PRECISION,
            )  # fmt: skip
        if not TRANSPOSED:
            b_out *= scale
        _store(p_out, b_out, o_t, o_v, so_t, so_d, o_t < length, DV)


@triton.jit
def _weight_gradients(
    p_do, p_v, o_t, scale, length, so_t, so_d, sv_t, sv_d,
    DV: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scale grad_out v^T`, the gradient of a chunk's weights (CHUNK, CHUNK)."""
    m_t = o_t < length
    b_dw = tl.zeros((CHUNK, CHUNK), tl.float32)
    for o_v in range(0, DV, BV):
        o_e = o_v + tl.arange(0, BV)
        b_do = _load(p_do, o_t, o_e, so_t, so_d, m_t, DV)
        b_v = _load(p_v, o_t, o_e, sv_t, sv_d, m_t, DV)
        b_dw += tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    return b_dw * scale


@triton.jit(do_not_specialize=["length"])
def gradients_kernel(
    p_q, p_k, p_v, p_g, p_do, p_s, p_ds, p_added_q, p_added_k, p_dq, p_dk, p_dg, scale, length, heads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, sg_b, sg_t, sg_h, sg_d,
    so_b, so_t, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One direction's gradients of q, k and its gates, from `dW = scale grad_out v^T` and the states S and theirs.

        dq_i = sum_j dW_ij D_ij k_j + scale grad_out_i S^T d_i,  dk_j = sum_i dW_ij D_ij q_i + v_j dS^T e_j,
        dg_t = sum_(j < t <= i) dW_ij q_i D_ij k_j, and what the states pass over t.

    D_ij is the decay from key j to query i, d_i that from the chunk's start to i, e_j that from j to its end.

    `added_q` and `added_k`, the other direction's, are added. Outputs (batch, length, heads, DK) contiguous.
    Grid: (batch x heads, chunks, tiles of DK).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // heads, i_row % heads
    i_c = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, CHUNK)
    o_r = o_c % BLOCK
    o_t = i_c * CHUNK + o_c
    o_d = tl.program_id(2) * BK + tl.arange(0, BK)
    m_t = o_t < length
    p_q += i_b * sq_b + i_h * sq_h
    p_k += i_b * sk_b + i_h * sk_h
    p_v += i_b * sv_b + i_h * sv_h
    p_g += i_b * sg_b + i_h * sg_h
    p_do += i_b * so_b + i_h * so_h
    s_t = heads * DK
    o_out = i_b * length * s_t + i_h * DK
    i_s = (i_row * tl.num_programs(1) + i_c) * DK * DV
    b_dw = _weight_gradients(p_do, p_v, o_t, scale, length, so_t, so_d, sv_t, sv_d, DV, BV, CHUNK, PRECISION)
    # (tokens, BK)
    b_q = _load(p_q, o_t, o_d, sq_t, sq_d, m_t, DK)
    b_k = _load(p_k, o_t, o_d, sk_t, sk_d, m_t, DK)
    b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_dw, 0.0), axis=1)
    b_g = _load(p_g, o_t, o_d, sg_t, sg_d, m_t, DK) * LOG2_E
    b_n = _next_gates(p_g, o_t, o_d, sg_t, sg_d, length, DK, REVERSE)
    b_near_q = tl.zeros((CHUNK, BK), tl.float32)
    b_near_k = tl.zeros((CHUNK, BK), tl.float32)
    if CHUNK > BLOCK:
        b_near_q, b_near_k = _segment_gradients(
            b_near_q, b_near_k, b_dw, b_q, b_k, b_g, b_n, BLOCK, REVERSE, PRECISION
        )  # fmt: skip
    if CHUNK > 2 * BLOCK:
        b_near_q, b_near_k = _segment_gradients(
            b_near_q, b_near_k, b_dw, b_q, b_k, b_g, b_n, 2 * BLOCK, REVERSE, PRECISION
        )  # fmt: skip
    m_other = o_r[:, None] != tl.arange(0, BLOCK)[None, :]
    # The decay from each block's key number i to its queries.
    b_block = tl.where(m_other, _diagonal(b_dw), 0.0)
    b_e = tl.zeros((CHUNK, BK), tl.float32)
    for step in range(BLOCK):
        i = step if REVERSE else BLOCK - 1 - step
        o_i = o_t - o_r + i
        b_next = _next_gates(p_g, o_i, o_d, sg_t, sg_d, length, DK, REVERSE)
        b_e = tl.where((o_r == i)[:, None], 1.0, b_e * tl.exp2(b_next))
        b_key = _load(p_k, o_i, o_d, sk_t, sk_d, o_i < length, DK)
        b_near_q += _column(b_block, i)[:, None] * b_e * b_key
    # The decay from each block's keys to its query number i.
    b_block = tl.where(m_other, _diagonal(tl.trans(b_dw)), 0.0)
    b_e = tl.zeros((CHUNK, BK), tl.float32)
    for step in range(BLOCK):
        i = BLOCK - 1 - step if REVERSE else step
        o_i = o_t - o_r + i
        b_gate = _load(p_g, o_i, o_d, sg_t, sg_d, o_i < length, DK) * LOG2_E
        b_e = tl.where((o_r == i)[:, None], 1.0, b_e * tl.exp2(b_gate))
        b_query = _load(p_q, o_i, o_d, sq_t, sq_d, o_i < length, DK)
        b_near_k += _column(b_block, i)[:, None] * b_e * b_query
    b_dq = b_near_q + b_own[:, None] * b_k
    b_dk = b_near_k + b_own[:, None] * b_q
    # A gate scales what passes from the tokens before it to those from it on: all pairs of them, which are all that
    # the later tokens' queries see less what their keys give among themselves.
    b_sum = b_q * b_near_q - b_k * b_near_k
    if p_s is not None:
        b_far_q = tl.zeros((CHUNK, BK), tl.float32)
        b_far_k = tl.zeros((CHUNK, BK), tl.float32)
        b_through = tl.zeros((BK,), tl.float32)
        for o_v in range(0, DV, BV):
            o_e = o_v + tl.arange(0, BV)
            # (BK, BV), (BK, BV), (tokens, BV) and (tokens, BV)
            b_s = _load(p_s + i_s, o_d.to(tl.int64), o_e, DV, 1, o_d < DK, DV)
            b_ds = _load(p_ds + i_s, o_d.to(tl.int64), o_e, DV, 1, o_d < DK, DV)
            b_do = _load(p_do, o_t, o_e, so_t, so_d, m_t, DV)
            b_v = _load(p_v, o_t, o_e, sv_t, sv_d, m_t, DV)
            b_far_q += tl.dot(b_do, tl.trans(b_s), input_precision=PRECISION)
            b_far_k += tl.dot(b_v, tl.trans(b_ds), input_precision=PRECISION)
            b_through += tl.sum(b_s * b_ds, axis=1)
        b_far_q *= _query_decay(b_g, CHUNK, REVERSE) * scale
        b_far_k *= _key_decay(b_n, CHUNK, REVERSE)
        b_dq += b_far_q
        b_dk += b_far_k
        b_dg = _sums(b_sum + b_q * b_far_q, CHUNK, not REVERSE)
        b_dg += _sums(b_k * b_far_k, CHUNK, REVERSE) - b_k * b_far_k
        b_dg += (tl.exp2(tl.sum(b_g, axis=0)) * b_through)[None, :]
    else:
        b_dg = _sums(b_sum, CHUNK, not REVERSE)
    _store(p_dg + o_out, b_dg, o_t, o_d, s_t, 1, m_t, DK)
    if p_added_q is not None:
        b_dq += _load(p_added_q + o_out, o_t, o_d, s_t, 1, m_t, DK)
    _store(p_dq + o_out, b_dq, o_t, o_d, s_t, 1, m_t, DK)
    if p_added_k is not None:
        b_dk += _load(p_added_k + o_out, o_t, o_d, s_t, 1, m_t, DK)
    _store(p_dk + o_out, b_dk, o_t, o_d, s_t, 1, m_t, DK)
