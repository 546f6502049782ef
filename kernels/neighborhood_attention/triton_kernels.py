"""The Triton kernels of neighborhood attention; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s<tensor>_<axis>. Maps have three axes, of
which the last AXES count. Positions on them are tuples of three: token numbers inside a residue class, as vectors or as
rows and columns of a tile of scores; `n` holds the lengths of the class.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(p_x, o_x, o_d, stride_d, m_x, SIZE: tl.constexpr):
    """A (tokens, SIZE) tile in float32 at the tokens' offsets, 0 outside."""
    mask = m_x[:, None] & (o_d < SIZE)[None, :]
    return tl.load(p_x + o_x[:, None] + o_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p_x, b_x, o_x, o_d, m_x, SIZE: tl.constexpr):
    mask = m_x[:, None] & (o_d < SIZE)[None, :]
    tl.store(p_x + o_x[:, None] + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _split_axis(index, size, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Take an axis' tile and residue class off a program's number: (the rest, first token, residue, class length)."""
    classes = tl.minimum(size, DILATION)
    tiles = tl.cdiv(tl.cdiv(size, classes), TILE)
    residue = index // tiles % classes
    return index // (tiles * classes), index % tiles * TILE, residue, (size - residue + DILATION - 1) // DILATION


@triton.jit
def _tile(N0, N1, N2, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Return (batch and head, first tokens, residues, class lengths) of this program's tile."""
    index, f2, r2, n2 = _split_axis(tl.program_id(0), N2, DILATION[2], TILE[2])
    index, f1, r1, n1 = _split_axis(index, N1, DILATION[1], TILE[1])
    index, f0, r0, n0 = _split_axis(index, N0, DILATION[0], TILE[0])
    return index, (f0, f1, f2), (r0, r1, r2), (n0, n1, n2)


@triton.jit
def _tokens(first, n, TILE: tl.constexpr):
    """Return a tile's tokens and which of them the class has."""
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    o_m = tl.arange(0, ROWS)
    i0 = first[0] + o_m // (TILE[1] * TILE[2])
    i1 = first[1] + o_m // TILE[2] % TILE[1]
    i2 = first[2] + o_m % TILE[2]
    return (i0, i1, i2), (i0 < n[0]) & (i1 < n[1]) & (i2 < n[2])


@triton.jit
def _box_tokens(o_n, low, width):
    """Return tokens number `o_n` of a box."""
    i0 = low[0] + o_n // (width[1] * width[2])
    i1 = low[1] + o_n // width[2] % width[1]
    i2 = low[2] + o_n % width[2]
    return i0, i1, i2


@triton.jit
def _offsets(i, r, s0, s1, s2, DILATION: tl.constexpr):
    """Return the tokens' offsets in a tensor of these strides."""
    o_x = (i[0] * DILATION[0] + r[0]).to(tl.int64) * s0
    o_x += (i[1] * DILATION[1] + r[1]).to(tl.int64) * s1
    return o_x + (i[2] * DILATION[2] + r[2]).to(tl.int64) * s2


@triton.jit
def _start(i, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    """The first key that the queries `i` see along an axis; `windows.axis_window` has the rules."""
    if CIRCULAR:
        start = i - KERNEL // 2
    elif CAUSAL:
        start = tl.minimum(i // STRIDE * STRIDE + STRIDE - 1, n - 1) - KERNEL + 1
    else:
        start = tl.minimum(tl.minimum(i // STRIDE * STRIDE + STRIDE // 2, n - 1) - KERNEL // 2, n - KERNEL)
    return tl.maximum(start, 0)


@triton.jit
def _stop(i, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    """One past the last key that the queries `i` see along an axis."""
    if CAUSAL:
        stop = i + 1
    elif CIRCULAR:
        stop = i + KERNEL // 2 + 1
    else:
        stop = _start(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) + KERNEL
    return tl.minimum(stop, n)


@triton.jit
def _keys(
    first, n, TILE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """Return along an axis the union of the windows of a tile's queries: (first key, keys)."""
    # Starts and stops never fall from one query to the next.
    low = _start(first, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)
    high = _stop(tl.minimum(first + TILE, n) - 1, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)
    # A tile may lie past the end of a shorter class.
    return low, tl.where(first < n, high - low, 0)


@triton.jit
def _queries(
    first, n, TILE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """Return along an axis the queries that may see a tile's keys: (first query, queries)."""
    last = tl.minimum(first + TILE, n) - 1
    if CIRCULAR:
        low = first if CAUSAL else tl.maximum(first - KERNEL // 2, 0)
        high = last + KERNEL // 2 + 1
    elif CAUSAL:
        low = first
        # Groups whose leader is at most last + KERNEL - 1.
        high = tl.where(last + KERNEL >= n, n, (last + KERNEL) // STRIDE * STRIDE)
    else:
        # Groups whose leader is at least first - (KERNEL - 1 - KERNEL // 2), and at most last + KERNEL // 2; the
        # windows of the border reach further.
        leader = first - (KERNEL - 1 - KERNEL // 2) - STRIDE // 2
        low = tl.where(first < KERNEL, 0, (tl.maximum(leader, 0) + STRIDE - 1) // STRIDE * STRIDE)
        leader = last + KERNEL // 2
        high = (tl.maximum(leader - STRIDE // 2, 0) // STRIDE + 1) * STRIDE
        high = tl.where((last >= n - KERNEL) | (leader >= n - 1), n, high)
    return low, tl.where(first < n, tl.maximum(tl.minimum(high, n) - low, 0), 0)


@triton.jit
def _box(
    first, n, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    CIRCULAR: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Return the box of the keys that a tile of queries sees, INVERSE of the queries that see a tile of keys.

    (first tokens, widths, tokens in all.)
    """
    if INVERSE:
        l0, w0 = _queries(first[0], n[0], TILE[0], KERNEL[0], STRIDE[0], CAUSAL[0], CIRCULAR)
        l1, w1 = _queries(first[1], n[1], TILE[1], KERNEL[1], STRIDE[1], CAUSAL[1], CIRCULAR)
        l2, w2 = _queries(first[2], n[2], TILE[2], KERNEL[2], STRIDE[2], CAUSAL[2], CIRCULAR)
    else:
        l0, w0 = _keys(first[0], n[0], TILE[0], KERNEL[0], STRIDE[0], CAUSAL[0], CIRCULAR)
        l1, w1 = _keys(first[1], n[1], TILE[1], KERNEL[1], STRIDE[1], CAUSAL[1], CIRCULAR)
        l2, w2 = _keys(first[2], n[2], TILE[2], KERNEL[2], STRIDE[2], CAUSAL[2], CIRCULAR)
    return (l0, l1, l2), (w0, w1, w2), w0 * w1 * w2


@triton.jit
def _rows(i):
    return i[0][:, None], i[1][:, None], i[2][:, None]


@triton.jit
def _columns(i):
    return i[0][None, :], i[1][None, :], i[2][None, :]


@triton.jit
def _sees(i, j, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    return (j >= _start(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)) & (j < _stop(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR))


@triton.jit
def _distance(i, j, WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    offset = (j - i).to(tl.int64) if WIDE else j - i
    return offset * offset * WEIGHT


@triton.jit
def _visible(
    i, j, n, AXES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr
):
    """Whether the queries `i` see the keys `j`. DISC: None, or a circular window's weights, limit and WIDE."""
    CIRCULAR: tl.constexpr = DISC is not None
    mask = _sees(i[2], j[2], n[2], KERNEL[2], STRIDE[2], CAUSAL[2], CIRCULAR)
    if AXES > 1:
        mask &= _sees(i[1], j[1], n[1], KERNEL[1], STRIDE[1], CAUSAL[1], CIRCULAR)
    if AXES > 2:
        mask &= _sees(i[0], j[0], n[0], KERNEL[0], STRIDE[0], CAUSAL[0], CIRCULAR)
    if CIRCULAR:
        distance = _distance(i[2], j[2], DISC[2], DISC[4])
        if AXES > 1:
            distance += _distance(i[1], j[1], DISC[1], DISC[4])
        if AXES > 2:
            distance += _distance(i[0], j[0], DISC[0], DISC[4])
        mask &= distance < DISC[3]
    return mask


@triton.jit
def _bias_index(i, j, AXES: tl.constexpr, KERNEL: tl.constexpr):
    """The places in the flattened table of position biases."""
    index = j[2] - i[2] + (KERNEL[2] - 1)
    if AXES > 1:
        index += (j[1] - i[1] + (KERNEL[1] - 1)) * (2 * KERNEL[2] - 1)
    if AXES > 2:
        index += (j[0] - i[0] + (KERNEL[0] - 1)) * ((2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    return index


@triton.jit
def _scores(
    b_products, i, j, m_pairs, n, scale, p_bias,
    AXES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """The scores of queries `i` with keys `j`, -inf where a query does not see a key or `m_pairs` rules it out."""
    m_pairs &= _visible(i, j, n, AXES, KERNEL, STRIDE, CAUSAL, DISC)
    b_s = b_products * scale
    if p_bias is not None:
        b_s += tl.load(p_bias + _bias_index(i, j, AXES, KERNEL), mask=m_pairs, other=0.0).to(tl.float32)
    return tl.where(m_pairs, b_s, float("-inf"))


@triton.jit
def _add_values(b_out, b_most, b_sum, b_s, b_v, PRECISION: tl.constexpr):
    """Go on with the online softmax: the sum of values, largest score and sum of exponentials so far."""
    b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
    # A query may see none of the keys so far.
    b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2((b_s - b_finite[:, None]) * LOG2_E)
    b_shrink = tl.exp2((b_most - b_finite) * LOG2_E)
    b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
    b_out = b_out * b_shrink[:, None] + tl.dot(b_p, b_v, input_precision=PRECISION)
    return b_out, b_new, b_sum


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def forward_kernel(
    p_q, p_k, p_v, p_extra_k, p_extra_v, p_bias, p_out, p_lse, scale, N0, N1, N2, heads, group, extra,
    sq_b, sq_0, sq_1, sq_2, sq_h, sq_d, sk_b, sk_0, sk_1, sk_2, sk_h, sk_d, sv_b, sv_0, sv_1, sv_2, sv_h, sv_d,
    sek_b, sek_e, sek_h, sek_d, sev_b, sev_e, sev_h, sev_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j softmax_j(scale q_i . k_j + bias) v_j` and the log-sum-exp of the scores.

    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    i_row, first, r, n = _tile(N0, N1, N2, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = _tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * sq_b + i_h.to(tl.int64) * sq_h
    p_k += i_b * sk_b + i_g * sk_h
    p_v += i_b * sv_b + i_g * sv_h
    if p_bias is not None:
        p_bias += i_h * TABLE
    # (queries, BK)
    b_q = _load(p_q, _offsets(i, r, sq_0, sq_1, sq_2, DILATION), o_k, sq_d, m_i, DK)
    b_out = tl.zeros((b_q.shape[0], BV), tl.float32)
    b_most = tl.full((b_q.shape[0],), float("-inf"), tl.float32)
    b_sum = tl.zeros((b_q.shape[0],), tl.float32)
    low, width, count = _box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, False)
    for o_start in range(0, count, BN):
        o_n = o_start + tl.arange(0, BN)
        j, m_j = _box_tokens(o_n, low, width), o_n < count
        # (BN, BK)
        b_k = _load(p_k, _offsets(j, r, sk_0, sk_1, sk_2, DILATION), o_k, sk_d, m_j, DK)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pairs = m_i[:, None] & m_j[None, :]
        b_s = _scores(b_s, _rows(i), _columns(j), m_pairs, n, scale, p_bias, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_v = _load(p_v, _offsets(j, r, sv_0, sv_1, sv_2, DILATION), o_v, sv_d, m_j, DV)
        b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, PRECISION)
    if p_extra_k is not None:
        p_extra_k += i_b * sek_b + i_g * sek_h
        p_extra_v += i_b * sev_b + i_g * sev_h
        for o_start in range(0, extra, BN):
            o_e = o_start + tl.arange(0, BN)
            m_e = o_e < extra
            b_k = _load(p_extra_k, o_e.to(tl.int64) * sek_e, o_k, sek_d, m_e, DK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            b_s = tl.where(m_e[None, :], b_s, float("-inf"))
            b_v = _load(p_extra_v, o_e.to(tl.int64) * sev_e, o_v, sev_d, m_e, DV)
            b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, PRECISION)
    # Tokens outside the map have summed up nothing.
    b_sum = tl.where(m_i, b_sum, 1.0)
    o_i = (i_b * N0 * N1 * N2 + _offsets(i, r, N1 * N2, N2, 1, DILATION)) * heads + i_h
    tl.store(p_lse + o_i, b_most + tl.log(b_sum), mask=m_i)
    _store(p_out, b_out / b_sum[:, None], o_i * DV, o_v, m_i, DV)


@triton.jit
def _score_gradients(b_s, b_lse, b_from_value, b_delta):
    """Return the probabilities and the gradients of the scores."""
    b_p = tl.exp2((b_s - b_lse) * LOG2_E)
    return b_p, b_p * (b_from_value - b_delta)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def query_gradients_kernel(
    p_q, p_k, p_v, p_extra_k, p_extra_v, p_bias, p_out, p_lse, p_do, p_dlse, p_delta, p_dq,
    scale, N0, N1, N2, heads, group, extra,
    sq_b, sq_0, sq_1, sq_2, sq_h, sq_d, sk_b, sk_0, sk_1, sk_2, sk_h, sk_d, sv_b, sv_0, sv_1, sv_2, sv_h, sv_d,
    sek_b, sek_e, sek_h, sek_d, sev_b, sev_e, sev_h, sev_d, so_b, so_0, so_1, so_2, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq_i = scale sum_j ds_ij k_j`, and `delta_i = out_i . grad_out_i - grad_lse_i`, which the other gradients need too.

    The gradient of a score is `ds_ij = p_ij (grad_out_i . v_j - delta_i)`.
    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    i_row, first, r, n = _tile(N0, N1, N2, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = _tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * sq_b + i_h.to(tl.int64) * sq_h
    p_k += i_b * sk_b + i_g * sk_h
    p_v += i_b * sv_b + i_g * sv_h
    p_do += i_b * so_b + i_h.to(tl.int64) * so_h
    if p_bias is not None:
        p_bias += i_h * TABLE
    o_i = (i_b * N0 * N1 * N2 + _offsets(i, r, N1 * N2, N2, 1, DILATION)) * heads + i_h
    b_do = _load(p_do, _offsets(i, r, so_0, so_1, so_2, DILATION), o_v, so_d, m_i, DV)
    b_delta = tl.sum(_load(p_out, o_i * DV, o_v, 1, m_i, DV) * b_do, axis=1)
    b_delta -= tl.load(p_dlse + o_i, mask=m_i, other=0.0)
    tl.store(p_delta + o_i, b_delta, mask=m_i)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_q = _load(p_q, _offsets(i, r, sq_0, sq_1, sq_2, DILATION), o_k, sq_d, m_i, DK)
    b_dq = tl.zeros((b_q.shape[0], BK), tl.float32)
    low, width, count = _box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, False)
    for o_start in range(0, count, BN):
        o_n = o_start + tl.arange(0, BN)
        j, m_j = _box_tokens(o_n, low, width), o_n < count
        # Values first: fewer registers are in use at once than with the keys before them.
        b_v = _load(p_v, _offsets(j, r, sv_0, sv_1, sv_2, DILATION), o_v, sv_d, m_j, DV)
        b_from_value = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        # (BN, BK)
        b_k = _load(p_k, _offsets(j, r, sk_0, sk_1, sk_2, DILATION), o_k, sk_d, m_j, DK)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pairs = m_i[:, None] & m_j[None, :]
        b_s = _scores(b_s, _rows(i), _columns(j), m_pairs, n, scale, p_bias, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        _, b_ds = _score_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
        b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    if p_extra_k is not None:
        p_extra_k += i_b * sek_b + i_g * sek_h
        p_extra_v += i_b * sev_b + i_g * sev_h
        for o_start in range(0, extra, BN):
            o_e = o_start + tl.arange(0, BN)
            m_e = o_e < extra
            b_v = _load(p_extra_v, o_e.to(tl.int64) * sev_e, o_v, sev_d, m_e, DV)
            b_from_value = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_k = _load(p_extra_k, o_e.to(tl.int64) * sek_e, o_k, sek_d, m_e, DK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            b_s = tl.where(m_e[None, :], b_s, float("-inf"))
            _, b_ds = _score_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
            b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    _store(p_dq, b_dq * scale, o_i * DK, o_k, m_i, DK)


@triton.jit
def _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, b_lse, b_delta, PRECISION: tl.constexpr):
    """Add a block of queries' part to the gradients of keys and values; rows of `b_s` are keys, columns queries."""
    b_from_value = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_p, b_ds = _score_gradients(b_s, b_lse[None, :], b_from_value, b_delta[None, :])
    b_dv += tl.dot(b_p, b_do, input_precision=PRECISION)
    b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def key_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, heads, group,
    sq_b, sq_0, sq_1, sq_2, sq_h, sq_d, sk_b, sk_0, sk_1, sk_2, sk_h, sk_d, sv_b, sv_0, sv_1, sv_2, sv_h, sv_d,
    so_b, so_0, so_1, so_2, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk_j = scale sum_i ds_ij q_i`, `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`.

    A tile of keys walks over the queries that see it, of all heads that share it.

    Grid: (batch x key heads x tiles of the maps of all residue classes).
    """
    i_row, first, r, n = _tile(N0, N1, N2, DILATION, TILE)
    key_heads = heads // group
    i_b, i_g = (i_row // key_heads).to(tl.int64), i_row % key_heads
    j, m_j = _tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_k += i_b * sk_b + i_g.to(tl.int64) * sk_h
    p_v += i_b * sv_b + i_g.to(tl.int64) * sv_h
    # (keys, BK) and (keys, BV)
    b_k = _load(p_k, _offsets(j, r, sk_0, sk_1, sk_2, DILATION), o_k, sk_d, m_j, DK)
    b_v = _load(p_v, _offsets(j, r, sv_0, sv_1, sv_2, DILATION), o_v, sv_d, m_j, DV)
    b_dk = tl.zeros((b_k.shape[0], BK), tl.float32)
    b_dv = tl.zeros((b_k.shape[0], BV), tl.float32)
    low, width, count = _box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, True)
    blocks = tl.cdiv(count, BN)
    # One loop over heads and blocks: nested loops take more registers.
    for step in range(group * blocks):
        i_h = (i_g * group + step // blocks).to(tl.int64)
        o_n = step % blocks * BN + tl.arange(0, BN)
        i, m_i = _box_tokens(o_n, low, width), o_n < count
        b_q = _load(p_q + i_b * sq_b + i_h * sq_h, _offsets(i, r, sq_0, sq_1, sq_2, DILATION), o_k, sq_d, m_i, DK)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        m_pairs = m_j[:, None] & m_i[None, :]
        p_table = p_bias
        if p_bias is not None:
            p_table += i_h * TABLE
        b_s = _scores(b_s, _columns(i), _rows(j), m_pairs, n, scale, p_table, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_do = _load(p_do + i_b * so_b + i_h * so_h, _offsets(i, r, so_0, so_1, so_2, DILATION), o_v, so_d, m_i, DV)
        o_i = (i_b * N0 * N1 * N2 + _offsets(i, r, N1 * N2, N2, 1, DILATION)) * heads + i_h
        b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
        b_dk, b_dv = _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, b_lse, b_delta, PRECISION)
    o_j = (i_b * N0 * N1 * N2 + _offsets(j, r, N1 * N2, N2, 1, DILATION)) * key_heads + i_g
    _store(p_dk, b_dk * scale, o_j * DK, o_k, m_j, DK)
    _store(p_dv, b_dv, o_j * DV, o_v, m_j, DV)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def extra_gradients_kernel(
    p_q, p_extra_k, p_extra_v, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, heads, group, extra,
    sq_b, sq_0, sq_1, sq_2, sq_h, sq_d, sek_b, sek_e, sek_h, sek_d, sev_b, sev_e, sev_h, sev_d,
    so_b, so_0, so_1, so_2, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    BE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk_e = scale sum_i ds_ie q_i`, `dv_e = sum_i p_ie do_i` over CHUNK queries and all heads that share the keys e.

    Writes (chunks, batch, extra, key heads, DK or DV).
    Grid: (batch x key heads, chunks of the map, blocks of additional keys).
    """
    key_heads = heads // group
    i_row = tl.program_id(0)
    i_b, i_g = (i_row // key_heads).to(tl.int64), i_row % key_heads
    i_c = tl.program_id(1).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    o_e = tl.program_id(2) * BE + tl.arange(0, BE)
    m_e = o_e < extra
    p_extra_k += i_b * sek_b + i_g.to(tl.int64) * sek_h
    p_extra_v += i_b * sev_b + i_g.to(tl.int64) * sev_h
    # (BE, BK) and (BE, BV)
    b_k = _load(p_extra_k, o_e.to(tl.int64) * sek_e, o_k, sek_d, m_e, DK)
    b_v = _load(p_extra_v, o_e.to(tl.int64) * sev_e, o_v, sev_d, m_e, DV)
    b_dk = tl.zeros((BE, BK), tl.float32)
    b_dv = tl.zeros((BE, BV), tl.float32)
    for step in range(group * (CHUNK // BN)):
        i_h = (i_g * group + step // (CHUNK // BN)).to(tl.int64)
        o_n = i_c * CHUNK + step % (CHUNK // BN) * BN + tl.arange(0, BN)
        m_n = o_n < N0 * N1 * N2
        o_0, o_1, o_2 = o_n // (N1 * N2), o_n // N2 % N1, o_n % N2
        o_q = o_0 * sq_0 + o_1 * sq_1 + o_2 * sq_2
        b_q = _load(p_q + i_b * sq_b + i_h * sq_h, o_q, o_k, sq_d, m_n, DK)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        b_s = tl.where(m_e[:, None] & m_n[None, :], b_s, float("-inf"))
        o_do = o_0 * so_0 + o_1 * so_1 + o_2 * so_2
        b_do = _load(p_do + i_b * so_b + i_h * so_h, o_do, o_v, so_d, m_n, DV)
        o_i = (i_b * N0 * N1 * N2 + o_n) * heads + i_h
        b_lse = tl.load(p_lse + o_i, mask=m_n, other=0.0)
        b_delta = tl.load(p_delta + o_i, mask=m_n, other=0.0)
        b_dk, b_dv = _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, b_lse, b_delta, PRECISION)
    batch = tl.num_programs(0) // key_heads
    o_x = ((i_c * batch + i_b) * extra + o_e) * key_heads + i_g
    _store(p_dk, b_dk * scale, o_x * DK, o_k, m_e, DK)
    _store(p_dv, b_dv, o_x * DV, o_v, m_e, DV)


@triton.jit
def _reach(
    i, m_i, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr
):  # fmt: skip
    """Return along an axis how far away the keys of a tile's queries lie: (least, number of distances)."""
    least = tl.min(tl.where(m_i, _start(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) - i, KERNEL - 1), axis=0)
    most = tl.max(tl.where(m_i, _stop(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) - 1 - i, 1 - KERNEL), axis=0)
    return least, tl.maximum(most - least + 1, 0)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def bias_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_lse, p_do, p_delta, p_dbias, scale, N0, N1, N2, heads, group,
    sq_b, sq_0, sq_1, sq_2, sq_h, sq_d, sk_b, sk_0, sk_1, sk_2, sk_h, sk_d, sv_b, sv_0, sv_1, sv_2, sv_h, sv_d,
    so_b, so_0, so_1, so_2, so_h, so_d,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """`dbias[o] = sum_i ds_(i, i + o)`: a tile of queries' part in the gradient of the table of position biases.

    For one distance after another, each query with the one key so far away: the sum over a tile is then no scatter.
    Writes (batch x heads x tiles, TABLE); entries that no query of the tile reaches are left as they are.
    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    CIRCULAR: tl.constexpr = DISC is not None
    i_row, first, r, n = _tile(N0, N1, N2, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = _tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * sq_b + i_h.to(tl.int64) * sq_h
    p_k += i_b * sk_b + i_g * sk_h
    p_v += i_b * sv_b + i_g * sv_h
    p_do += i_b * so_b + i_h.to(tl.int64) * so_h
    o_i = (i_b * N0 * N1 * N2 + _offsets(i, r, N1 * N2, N2, 1, DILATION)) * heads + i_h
    b_q = _load(p_q, _offsets(i, r, sq_0, sq_1, sq_2, DILATION), o_k, sq_d, m_i, DK)
    b_do = _load(p_do, _offsets(i, r, so_0, so_1, so_2, DILATION), o_v, so_d, m_i, DV)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
    l0, w0 = _reach(i[0], m_i, n[0], KERNEL[0], STRIDE[0], CAUSAL[0], CIRCULAR)
    l1, w1 = _reach(i[1], m_i, n[1], KERNEL[1], STRIDE[1], CAUSAL[1], CIRCULAR)
    l2, w2 = _reach(i[2], m_i, n[2], KERNEL[2], STRIDE[2], CAUSAL[2], CIRCULAR)
    p_dbias += tl.program_id(0).to(tl.int64) * TABLE
    for step in range(w0 * w1 * w2):
        far = _box_tokens(step, (l0, l1, l2), (w0, w1, w2))
        j = (i[0] + far[0], i[1] + far[1], i[2] + far[2])
        m_j = m_i & _visible(i, j, n, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_k = _load(p_k, _offsets(j, r, sk_0, sk_1, sk_2, DILATION), o_k, sk_d, m_j, DK)
        b_v = _load(p_v, _offsets(j, r, sv_0, sv_1, sv_2, DILATION), o_v, sv_d, m_j, DV)
        index = _bias_index((0, 0, 0), far, AXES, KERNEL)
        b_bias = tl.load(p_bias + i_h * TABLE + index).to(tl.float32)
        b_s = tl.where(m_j, tl.sum(b_q * b_k, axis=1) * scale + b_bias, float("-inf"))
        _, b_ds = _score_gradients(b_s, b_lse, tl.sum(b_do * b_v, axis=1), b_delta)
        tl.store(p_dbias + index, tl.sum(b_ds, axis=0))
