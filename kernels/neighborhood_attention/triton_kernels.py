"""The Triton kernels of neighborhood attention; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s_: one tuple a tensor. Maps have three
axes, of which the last AXES count; `triton_windows.py` says where tokens and windows lie on them. Additional keys are
(batch, extra, heads, dim).
"""

import triton
import triton.language as tl

from visionmix.kernels.neighborhood_attention.triton_windows import (
    LOG2_E,
    bias_index,
    box_tokens,
    columns,
    find_box,
    find_tile,
    first_key,
    key_stop,
    offsets,
    rows,
    tile_tokens,
    token_numbers,
    visible,
)


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
def _scores(
    b_products, i, j, m_pairs, n, scale, p_bias,
    AXES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """The scores of queries `i` with keys `j`, -inf where a query does not see a key or `m_pairs` rules it out."""
    m_pairs &= visible(i, j, n, AXES, KERNEL, STRIDE, CAUSAL, DISC)
    b_s = b_products * scale
    if p_bias is not None:
        b_s += tl.load(p_bias + bias_index(i, j, AXES, KERNEL), mask=m_pairs, other=0.0).to(tl.float32)
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
    s_q, s_k, s_v, s_ek, s_ev,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j softmax_j(scale q_i . k_j + bias) v_j` and the log-sum-exp of the scores.

    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    sizes = (N0, N1, N2)
    i_row, first, r, n = find_tile(sizes, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = tile_tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * s_q[0] + i_h.to(tl.int64) * s_q[4]
    p_k += i_b * s_k[0] + i_g * s_k[4]
    p_v += i_b * s_v[0] + i_g * s_v[4]
    if p_bias is not None:
        p_bias += i_h * TABLE
    # (queries, BK)
    b_q = _load(p_q, offsets(i, r, s_q, DILATION), o_k, s_q[5], m_i, DK)
    b_out = tl.zeros((b_q.shape[0], BV), tl.float32)
    b_most = tl.full((b_q.shape[0],), float("-inf"), tl.float32)
    b_sum = tl.zeros((b_q.shape[0],), tl.float32)
    low, width, count = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, False)
    for o_start in range(0, count, BN):
        o_n = o_start + tl.arange(0, BN)
        j, m_j = box_tokens(o_n, low, width), o_n < count
        # (BN, BK)
        b_k = _load(p_k, offsets(j, r, s_k, DILATION), o_k, s_k[5], m_j, DK)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pairs = m_i[:, None] & m_j[None, :]
        b_s = _scores(b_s, rows(i), columns(j), m_pairs, n, scale, p_bias, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_v = _load(p_v, offsets(j, r, s_v, DILATION), o_v, s_v[5], m_j, DV)
        b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, PRECISION)
    if p_extra_k is not None:
        p_extra_k += i_b * s_ek[0] + i_g * s_ek[2]
        p_extra_v += i_b * s_ev[0] + i_g * s_ev[2]
        for o_start in range(0, extra, BN):
            o_e = o_start + tl.arange(0, BN)
            m_e = o_e < extra
            b_k = _load(p_extra_k, o_e.to(tl.int64) * s_ek[1], o_k, s_ek[3], m_e, DK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            b_s = tl.where(m_e[None, :], b_s, float("-inf"))
            b_v = _load(p_extra_v, o_e.to(tl.int64) * s_ev[1], o_v, s_ev[3], m_e, DV)
            b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, PRECISION)
    # Tokens outside the map have summed up nothing.
    b_sum = tl.where(m_i, b_sum, 1.0)
    o_i = (i_b * N0 * N1 * N2 + token_numbers(i, r, sizes, DILATION)) * heads + i_h
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
    s_q, s_k, s_v, s_ek, s_ev, s_o,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq_i = scale sum_j ds_ij k_j`, and `delta_i = out_i . grad_out_i - grad_lse_i`, which other gradients need too.

    The gradient of a score is `ds_ij = p_ij (grad_out_i . v_j - delta_i)`.
    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    sizes = (N0, N1, N2)
    i_row, first, r, n = find_tile(sizes, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = tile_tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * s_q[0] + i_h.to(tl.int64) * s_q[4]
    p_k += i_b * s_k[0] + i_g * s_k[4]
    p_v += i_b * s_v[0] + i_g * s_v[4]
    p_do += i_b * s_o[0] + i_h.to(tl.int64) * s_o[4]
    if p_bias is not None:
        p_bias += i_h * TABLE
    o_i = (i_b * N0 * N1 * N2 + token_numbers(i, r, sizes, DILATION)) * heads + i_h
    b_do = _load(p_do, offsets(i, r, s_o, DILATION), o_v, s_o[5], m_i, DV)
    b_delta = tl.sum(_load(p_out, o_i * DV, o_v, 1, m_i, DV) * b_do, axis=1)
    b_delta -= tl.load(p_dlse + o_i, mask=m_i, other=0.0)
    tl.store(p_delta + o_i, b_delta, mask=m_i)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_q = _load(p_q, offsets(i, r, s_q, DILATION), o_k, s_q[5], m_i, DK)
    b_dq = tl.zeros((b_q.shape[0], BK), tl.float32)
    low, width, count = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, False)
    for o_start in range(0, count, BN):
        o_n = o_start + tl.arange(0, BN)
        j, m_j = box_tokens(o_n, low, width), o_n < count
        # Values first: fewer registers are in use at once than with the keys before them.
        b_v = _load(p_v, offsets(j, r, s_v, DILATION), o_v, s_v[5], m_j, DV)
        b_from_value = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        # (BN, BK)
        b_k = _load(p_k, offsets(j, r, s_k, DILATION), o_k, s_k[5], m_j, DK)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pairs = m_i[:, None] & m_j[None, :]
        b_s = _scores(b_s, rows(i), columns(j), m_pairs, n, scale, p_bias, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        _, b_ds = _score_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
        b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    if p_extra_k is not None:
        p_extra_k += i_b * s_ek[0] + i_g * s_ek[2]
        p_extra_v += i_b * s_ev[0] + i_g * s_ev[2]
        for o_start in range(0, extra, BN):
            o_e = o_start + tl.arange(0, BN)
            m_e = o_e < extra
            b_v = _load(p_extra_v, o_e.to(tl.int64) * s_ev[1], o_v, s_ev[3], m_e, DV)
            b_from_value = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_k = _load(p_extra_k, o_e.to(tl.int64) * s_ek[1], o_k, s_ek[3], m_e, DK)
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
    s_q, s_k, s_v, s_o,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, AXES: tl.constexpr, TABLE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, DISC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk_j = scale sum_i ds_ij q_i`, `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`.

    A tile of keys walks over the queries that see it, of all heads that share it.

    Grid: (batch x key heads x tiles of the maps of all residue classes).
    """
    sizes = (N0, N1, N2)
    i_row, first, r, n = find_tile(sizes, DILATION, TILE)
    key_heads = heads // group
    i_b, i_g = (i_row // key_heads).to(tl.int64), i_row % key_heads
    j, m_j = tile_tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_k += i_b * s_k[0] + i_g.to(tl.int64) * s_k[4]
    p_v += i_b * s_v[0] + i_g.to(tl.int64) * s_v[4]
    # (keys, BK) and (keys, BV)
    b_k = _load(p_k, offsets(j, r, s_k, DILATION), o_k, s_k[5], m_j, DK)
    b_v = _load(p_v, offsets(j, r, s_v, DILATION), o_v, s_v[5], m_j, DV)
    b_dk = tl.zeros((b_k.shape[0], BK), tl.float32)
    b_dv = tl.zeros((b_k.shape[0], BV), tl.float32)
    low, width, count = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, True)
    blocks = tl.cdiv(count, BN)
    # One loop over heads and blocks: nested loops take more registers.
    for step in range(group * blocks):
        i_h = (i_g * group + step // blocks).to(tl.int64)
        o_n = step % blocks * BN + tl.arange(0, BN)
        i, m_i = box_tokens(o_n, low, width), o_n < count
        b_q = _load(p_q + i_b * s_q[0] + i_h * s_q[4], offsets(i, r, s_q, DILATION), o_k, s_q[5], m_i, DK)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        m_pairs = m_j[:, None] & m_i[None, :]
        p_table = p_bias
        if p_bias is not None:
            p_table += i_h * TABLE
        b_s = _scores(b_s, columns(i), rows(j), m_pairs, n, scale, p_table, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_do = _load(p_do + i_b * s_o[0] + i_h * s_o[4], offsets(i, r, s_o, DILATION), o_v, s_o[5], m_i, DV)
        o_i = (i_b * N0 * N1 * N2 + token_numbers(i, r, sizes, DILATION)) * heads + i_h
        b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
        b_dk, b_dv = _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, b_lse, b_delta, PRECISION)
    o_j = (i_b * N0 * N1 * N2 + token_numbers(j, r, sizes, DILATION)) * key_heads + i_g
    _store(p_dk, b_dk * scale, o_j * DK, o_k, m_j, DK)
    _store(p_dv, b_dv, o_j * DV, o_v, m_j, DV)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def extra_gradients_kernel(
    p_q, p_extra_k, p_extra_v, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, heads, group, extra,
    s_q, s_ek, s_ev, s_o,
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
    p_extra_k += i_b * s_ek[0] + i_g.to(tl.int64) * s_ek[2]
    p_extra_v += i_b * s_ev[0] + i_g.to(tl.int64) * s_ev[2]
    # (BE, BK) and (BE, BV)
    b_k = _load(p_extra_k, o_e.to(tl.int64) * s_ek[1], o_k, s_ek[3], m_e, DK)
    b_v = _load(p_extra_v, o_e.to(tl.int64) * s_ev[1], o_v, s_ev[3], m_e, DV)
    b_dk = tl.zeros((BE, BK), tl.float32)
    b_dv = tl.zeros((BE, BV), tl.float32)
    for step in range(group * (CHUNK // BN)):
        i_h = (i_g * group + step // (CHUNK // BN)).to(tl.int64)
        o_n = i_c * CHUNK + step % (CHUNK // BN) * BN + tl.arange(0, BN)
        m_n = o_n < N0 * N1 * N2
        o_0, o_1, o_2 = o_n // (N1 * N2), o_n // N2 % N1, o_n % N2
        o_q = o_0 * s_q[1] + o_1 * s_q[2] + o_2 * s_q[3]
        b_q = _load(p_q + i_b * s_q[0] + i_h * s_q[4], o_q, o_k, s_q[5], m_n, DK)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        b_s = tl.where(m_e[:, None] & m_n[None, :], b_s, float("-inf"))
        o_do = o_0 * s_o[1] + o_1 * s_o[2] + o_2 * s_o[3]
        b_do = _load(p_do + i_b * s_o[0] + i_h * s_o[4], o_do, o_v, s_o[5], m_n, DV)
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
    least = tl.min(tl.where(m_i, first_key(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) - i, KERNEL - 1), axis=0)
    most = tl.max(tl.where(m_i, key_stop(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) - 1 - i, 1 - KERNEL), axis=0)
    return least, tl.maximum(most - least + 1, 0)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def bias_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_lse, p_do, p_delta, p_dbias, scale, N0, N1, N2, heads, group,
    s_q, s_k, s_v, s_o,
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
    sizes = (N0, N1, N2)
    i_row, first, r, n = find_tile(sizes, DILATION, TILE)
    i_b, i_h = (i_row // heads).to(tl.int64), i_row % heads
    i_g = (i_h // group).to(tl.int64)
    i, m_i = tile_tokens(first, n, TILE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * s_q[0] + i_h.to(tl.int64) * s_q[4]
    p_k += i_b * s_k[0] + i_g * s_k[4]
    p_v += i_b * s_v[0] + i_g * s_v[4]
    p_do += i_b * s_o[0] + i_h.to(tl.int64) * s_o[4]
    o_i = (i_b * N0 * N1 * N2 + token_numbers(i, r, sizes, DILATION)) * heads + i_h
    b_q = _load(p_q, offsets(i, r, s_q, DILATION), o_k, s_q[5], m_i, DK)
    b_do = _load(p_do, offsets(i, r, s_o, DILATION), o_v, s_o[5], m_i, DV)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
    l0, w0 = _reach(i[0], m_i, n[0], KERNEL[0], STRIDE[0], CAUSAL[0], CIRCULAR)
    l1, w1 = _reach(i[1], m_i, n[1], KERNEL[1], STRIDE[1], CAUSAL[1], CIRCULAR)
    l2, w2 = _reach(i[2], m_i, n[2], KERNEL[2], STRIDE[2], CAUSAL[2], CIRCULAR)
    p_dbias += tl.program_id(0).to(tl.int64) * TABLE
    for step in range(w0 * w1 * w2):
        far = box_tokens(step, (l0, l1, l2), (w0, w1, w2))
        j = (i[0] + far[0], i[1] + far[1], i[2] + far[2])
        m_j = m_i & visible(i, j, n, AXES, KERNEL, STRIDE, CAUSAL, DISC)
        b_k = _load(p_k, offsets(j, r, s_k, DILATION), o_k, s_k[5], m_j, DK)
        b_v = _load(p_v, offsets(j, r, s_v, DILATION), o_v, s_v[5], m_j, DV)
        index = bias_index((0, 0, 0), far, AXES, KERNEL)
        b_bias = tl.load(p_bias + i_h * TABLE + index).to(tl.float32)
        b_s = tl.where(m_j, tl.sum(b_q * b_k, axis=1) * scale + b_bias, float("-inf"))
        _, b_ds = _score_gradients(b_s, b_lse, tl.sum(b_do * b_v, axis=1), b_delta)
        tl.store(p_dbias + index, tl.sum(b_ds, axis=0))
