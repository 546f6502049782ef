"""The Triton kernels of neighborhood attention; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s_: one tuple a tensor. Maps have three
axes, of which the window's last AXES count; `triton_windows.py` says where tokens and windows lie on them. Additional
keys are a map of one axis.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from visionmix.kernels.neighborhood_attention.triton_windows import (
    bias_index,
    box_tokens,
    columns,
    find_box,
    find_tile,
    first_key,
    key_stop,
    load_channels,
    offsets,
    rows,
    store_channels,
    tile_tokens,
    visible,
)
from visionmix.kernels.triton_products import LOG2_E, dot, zeros


class Blocks(NamedTuple):
    """The tokens that a program takes at once, a constant of the kernels.

    Attributes:
        TILE: A tile's tokens along each axis.
        BN: Tokens of a block of the box that the program walks over.
    """

    TILE: tuple[int, int, int]
    BN: int


@triton.jit
def _head(p_x, s_x, i_b, i_h):
    """The pointer to a head of an image."""
    return p_x + i_b * s_x.batch + i_h.to(tl.int64) * s_x.head


@triton.jit
def _load(p_x, o_x, s_x, m_x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A (tokens, BLOCK) tile in float32 at the tokens' offsets, 0 outside."""
    return load_channels(p_x, o_x, m_x, s_x.dim, SIZE, BLOCK).to(tl.float32)


@triton.jit
def _tile(sizes, heads, window: tl.constexpr, blocks: tl.constexpr):
    """Return of this program's tile (image, head, first tokens, residues, class lengths, tokens, mask)."""
    i_row, first, r, n = find_tile(sizes, window, blocks)
    i, m_i = tile_tokens(first, n, blocks)
    return (i_row // heads).to(tl.int64), i_row % heads, first, r, n, i, m_i


@triton.jit
def _block(o_start, box, BN: tl.constexpr):
    """Return the tokens of a block of the box (first tokens, widths, tokens in all), and which of them the box has."""
    o_n = o_start + tl.arange(0, BN)
    return box_tokens(o_n, box[0], box[1]), o_n < box[2]


@triton.jit
def _extra(o_start, extra, BLOCK: tl.constexpr):
    """Return the numbers of a block of additional keys, and which of them there are."""
    o_e = o_start + tl.arange(0, BLOCK)
    return o_e.to(tl.int64), o_e < extra


@triton.jit
def _numbers(i, r, i_b, i_h, sizes, heads, window: tl.constexpr):
    """The numbers of a head's tokens among the (batch, three axes, heads) of a contiguous tensor."""
    token = offsets(i, r, (sizes[1] * sizes[2], sizes[2], 1), window)
    return (i_b * sizes[0] * sizes[1] * sizes[2] + token) * heads + i_h


@triton.jit
def _scores(b_products, i, j, m_pairs, n, scale, p_bias, window: tl.constexpr):
    """The scores of queries `i` with keys `j`, -inf where a query does not see a key or `m_pairs` rules it out."""
    m_pairs &= visible(i, j, n, window)
    b_s = b_products * scale
    if p_bias is not None:
        b_s += tl.load(p_bias + bias_index(i, j, window), mask=m_pairs, other=0.0).to(tl.float32)
    return tl.where(m_pairs, b_s, float("-inf"))


@triton.jit
def _add_values(b_out, b_most, b_sum, b_s, b_v, channels: tl.constexpr):
    """Go on with the online softmax: the sum of values, largest score and sum of exponentials so far."""
    b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
    # A query may see none of the keys so far.
    b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2((b_s - b_finite[:, None]) * LOG2_E)
    b_shrink = tl.exp2((b_most - b_finite) * LOG2_E)
    b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
    b_out = b_out * b_shrink[:, None] + dot(b_p, b_v, channels)
    return b_out, b_new, b_sum


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def forward_kernel(
    p_q, p_k, p_v, p_extra_k, p_extra_v, p_bias, p_out, p_lse, scale, N0, N1, N2, heads, group, extra,
    s_q, s_k, s_v, s_ek, s_ev, window: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j softmax_j(scale q_i . k_j + bias) v_j` and the log-sum-exp of the scores.

    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    i_b, i_h, first, r, n, i, m_i = _tile((N0, N1, N2), heads, window, blocks)
    i_g = i_h // group
    p_k = _head(p_k, s_k, i_b, i_g)
    p_v = _head(p_v, s_v, i_b, i_g)
    if p_bias is not None:
        p_bias += i_h * window.TABLE
    # (queries, BK)
    p_q = _head(p_q, s_q, i_b, i_h)
    b_q = _load(p_q, offsets(i, r, s_q.axes, window), s_q, m_i, channels.DK, channels.BK)
    b_out = zeros(b_q.shape[0], channels.BV)
    b_most = tl.full((b_q.shape[0],), float("-inf"), tl.float32)
    b_sum = tl.zeros((b_q.shape[0],), tl.float32)
    box = find_box(first, n, window, blocks, False)
    for o_start in range(0, box[2], blocks.BN):
        j, m_j = _block(o_start, box, blocks.BN)
        # (BN, BK)
        b_k = _load(p_k, offsets(j, r, s_k.axes, window), s_k, m_j, channels.DK, channels.BK)
        b_s = dot(b_q, tl.trans(b_k), channels)
        b_s = _scores(b_s, rows(i), columns(j), m_i[:, None] & m_j[None, :], n, scale, p_bias, window)
        b_v = _load(p_v, offsets(j, r, s_v.axes, window), s_v, m_j, channels.DV, channels.BV)
        b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, channels)
    if p_extra_k is not None:
        p_extra_k, p_extra_v = _head(p_extra_k, s_ek, i_b, i_g), _head(p_extra_v, s_ev, i_b, i_g)
        for o_start in range(0, extra, blocks.BN):
            o_e, m_e = _extra(o_start, extra, blocks.BN)
            b_k = _load(p_extra_k, o_e * s_ek.axes[2], s_ek, m_e, channels.DK, channels.BK)
            b_s = dot(b_q, tl.trans(b_k), channels) * scale
            b_s = tl.where(m_e[None, :], b_s, float("-inf"))
            b_v = _load(p_extra_v, o_e * s_ev.axes[2], s_ev, m_e, channels.DV, channels.BV)
            b_out, b_most, b_sum = _add_values(b_out, b_most, b_sum, b_s, b_v, channels)
    # Tokens outside the map have summed up nothing.
    b_sum = tl.where(m_i, b_sum, 1.0)
    o_i = _numbers(i, r, i_b, i_h, (N0, N1, N2), heads, window)
    tl.store(p_lse + o_i, b_most + tl.log(b_sum), mask=m_i)
    store_channels(p_out, b_out / b_sum[:, None], o_i * channels.DV, m_i, channels.DV, channels.BV)


@triton.jit
def _score_gradients(b_s, b_lse, b_from_value, b_delta):
    """Return the probabilities and the gradients of the scores."""
    b_p = tl.exp2((b_s - b_lse) * LOG2_E)
    return b_p, b_p * (b_from_value - b_delta)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def query_gradients_kernel(
    p_q, p_k, p_v, p_extra_k, p_extra_v, p_bias, p_out, p_lse, p_do, p_dlse, p_delta, p_dq, scale, N0, N1, N2, heads,
    group, extra, s_q, s_k, s_v, s_ek, s_ev, s_o, window: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dq_i = scale sum_j ds_ij k_j`, and `delta_i = out_i . grad_out_i - grad_lse_i`, which other gradients need too.

    The gradient of a score is `ds_ij = p_ij (grad_out_i . v_j - delta_i)`.
    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    i_b, i_h, first, r, n, i, m_i = _tile((N0, N1, N2), heads, window, blocks)
    i_g = i_h // group
    p_q = _head(p_q, s_q, i_b, i_h)
    p_k = _head(p_k, s_k, i_b, i_g)
    p_v = _head(p_v, s_v, i_b, i_g)
    p_do = _head(p_do, s_o, i_b, i_h)
    if p_bias is not None:
        p_bias += i_h * window.TABLE
    o_i = _numbers(i, r, i_b, i_h, (N0, N1, N2), heads, window)
    b_do = _load(p_do, offsets(i, r, s_o.axes, window), s_o, m_i, channels.DV, channels.BV)
    b_out = load_channels(p_out, o_i * channels.DV, m_i, 1, channels.DV, channels.BV).to(tl.float32)
    b_delta = tl.sum(b_out * b_do, axis=1)
    b_delta -= tl.load(p_dlse + o_i, mask=m_i, other=0.0)
    tl.store(p_delta + o_i, b_delta, mask=m_i)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_q = _load(p_q, offsets(i, r, s_q.axes, window), s_q, m_i, channels.DK, channels.BK)
    b_dq = zeros(b_q.shape[0], channels.BK)
    box = find_box(first, n, window, blocks, False)
    for o_start in range(0, box[2], blocks.BN):
        j, m_j = _block(o_start, box, blocks.BN)
        # Values first: fewer registers are in use at once than with the keys before them.
        b_v = _load(p_v, offsets(j, r, s_v.axes, window), s_v, m_j, channels.DV, channels.BV)
        b_from_value = dot(b_do, tl.trans(b_v), channels)
        # (BN, BK)
        b_k = _load(p_k, offsets(j, r, s_k.axes, window), s_k, m_j, channels.DK, channels.BK)
        b_s = dot(b_q, tl.trans(b_k), channels)
        b_s = _scores(b_s, rows(i), columns(j), m_i[:, None] & m_j[None, :], n, scale, p_bias, window)
        _, b_ds = _score_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
        b_dq += dot(b_ds, b_k, channels)
    if p_extra_k is not None:
        p_extra_k, p_extra_v = _head(p_extra_k, s_ek, i_b, i_g), _head(p_extra_v, s_ev, i_b, i_g)
        for o_start in range(0, extra, blocks.BN):
            o_e, m_e = _extra(o_start, extra, blocks.BN)
            b_v = _load(p_extra_v, o_e * s_ev.axes[2], s_ev, m_e, channels.DV, channels.BV)
            b_from_value = dot(b_do, tl.trans(b_v), channels)
            b_k = _load(p_extra_k, o_e * s_ek.axes[2], s_ek, m_e, channels.DK, channels.BK)
            b_s = dot(b_q, tl.trans(b_k), channels) * scale
            b_s = tl.where(m_e[None, :], b_s, float("-inf"))
            _, b_ds = _score_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
            b_dq += dot(b_ds, b_k, channels)
    store_channels(p_dq, b_dq * scale, o_i * channels.DK, m_i, channels.DK, channels.BK)


@triton.jit
def _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, p_lse, p_delta, m_i, channels: tl.constexpr):
    """Add a block of queries' part to the gradients of keys and values; rows of `b_s` are keys, columns queries."""
    b_lse = tl.load(p_lse, mask=m_i, other=0.0)
    b_delta = tl.load(p_delta, mask=m_i, other=0.0)
    b_from_value = dot(b_v, tl.trans(b_do), channels)
    b_p, b_ds = _score_gradients(b_s, b_lse[None, :], b_from_value, b_delta[None, :])
    b_dv += dot(b_p, b_do, channels)
    b_dk += dot(b_ds, b_q, channels)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def key_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, heads, group, s_q, s_k, s_v, s_o,
    window: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dk_j = scale sum_i ds_ij q_i`, `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`.

    A tile of keys walks over the queries that see it, of all heads that share it.

    Grid: (batch x key heads x tiles of the maps of all residue classes).
    """
    key_heads = heads // group
    i_b, i_g, first, r, n, j, m_j = _tile((N0, N1, N2), key_heads, window, blocks)
    p_k = _head(p_k, s_k, i_b, i_g)
    p_v = _head(p_v, s_v, i_b, i_g)
    # (keys, BK) and (keys, BV)
    b_k = _load(p_k, offsets(j, r, s_k.axes, window), s_k, m_j, channels.DK, channels.BK)
    b_v = _load(p_v, offsets(j, r, s_v.axes, window), s_v, m_j, channels.DV, channels.BV)
    b_dk = zeros(b_k.shape[0], channels.BK)
    b_dv = zeros(b_k.shape[0], channels.BV)
    box = find_box(first, n, window, blocks, True)
    steps = tl.cdiv(box[2], blocks.BN)
    # One loop over heads and blocks: nested loops take more registers.
    for step in range(group * steps):
        i_h = (i_g * group + step // steps).to(tl.int64)
        i, m_i = _block(step % steps * blocks.BN, box, blocks.BN)
        o_q = offsets(i, r, s_q.axes, window)
        b_q = _load(_head(p_q, s_q, i_b, i_h), o_q, s_q, m_i, channels.DK, channels.BK)
        b_s = dot(b_k, tl.trans(b_q), channels)
        p_table = p_bias
        if p_bias is not None:
            p_table += i_h * window.TABLE
        b_s = _scores(b_s, columns(i), rows(j), m_j[:, None] & m_i[None, :], n, scale, p_table, window)
        o_do = offsets(i, r, s_o.axes, window)
        b_do = _load(_head(p_do, s_o, i_b, i_h), o_do, s_o, m_i, channels.DV, channels.BV)
        o_i = _numbers(i, r, i_b, i_h, (N0, N1, N2), heads, window)
        b_dk, b_dv = _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, p_lse + o_i, p_delta + o_i, m_i, channels)
    o_j = _numbers(j, r, i_b, i_g, (N0, N1, N2), key_heads, window)
    store_channels(p_dk, b_dk * scale, o_j * channels.DK, m_j, channels.DK, channels.BK)
    store_channels(p_dv, b_dv, o_j * channels.DV, m_j, channels.DV, channels.BV)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def extra_gradients_kernel(
    p_q, p_extra_k, p_extra_v, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, heads, group, extra,
    s_q, s_ek, s_ev, s_o, BN: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dk_e = scale sum_i ds_ie q_i`, `dv_e = sum_i p_ie do_i` over CHUNK queries and all heads that share the keys e.

    Writes (chunks, batch, extra, key heads, DK or DV).
    Grid: (batch x key heads, chunks of the map, blocks of additional keys).
    """
    key_heads = heads // group
    i_row = tl.program_id(0)
    i_b, i_g = (i_row // key_heads).to(tl.int64), i_row % key_heads
    i_c = tl.program_id(1).to(tl.int64)
    o_e, m_e = _extra(tl.program_id(2) * BE, extra, BE)
    p_extra_k = _head(p_extra_k, s_ek, i_b, i_g)
    p_extra_v = _head(p_extra_v, s_ev, i_b, i_g)
    # (BE, BK) and (BE, BV)
    b_k = _load(p_extra_k, o_e * s_ek.axes[2], s_ek, m_e, channels.DK, channels.BK)
    b_v = _load(p_extra_v, o_e * s_ev.axes[2], s_ev, m_e, channels.DV, channels.BV)
    b_dk = zeros(BE, channels.BK)
    b_dv = zeros(BE, channels.BV)
    for step in range(group * (CHUNK // BN)):
        i_h = (i_g * group + step // (CHUNK // BN)).to(tl.int64)
        o_n = i_c * CHUNK + step % (CHUNK // BN) * BN + tl.arange(0, BN)
        m_n = o_n < N0 * N1 * N2
        o_0, o_1, o_2 = o_n // (N1 * N2), o_n // N2 % N1, o_n % N2
        o_q = o_0 * s_q.axes[0] + o_1 * s_q.axes[1] + o_2 * s_q.axes[2]
        b_q = _load(_head(p_q, s_q, i_b, i_h), o_q, s_q, m_n, channels.DK, channels.BK)
        b_s = dot(b_k, tl.trans(b_q), channels) * scale
        b_s = tl.where(m_e[:, None] & m_n[None, :], b_s, float("-inf"))
        o_do = o_0 * s_o.axes[0] + o_1 * s_o.axes[1] + o_2 * s_o.axes[2]
        b_do = _load(_head(p_do, s_o, i_b, i_h), o_do, s_o, m_n, channels.DV, channels.BV)
        o_i = (i_b * N0 * N1 * N2 + o_n) * heads + i_h
        b_dk, b_dv = _add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, p_lse + o_i, p_delta + o_i, m_n, channels)
    batch = tl.num_programs(0) // key_heads
    o_x = ((i_c * batch + i_b) * extra + o_e) * key_heads + i_g
    store_channels(p_dk, b_dk * scale, o_x * channels.DK, m_e, channels.DK, channels.BK)
    store_channels(p_dv, b_dv, o_x * channels.DV, m_e, channels.DV, channels.BV)


@triton.jit
def _reach(i, m_i, n, window: tl.constexpr, AXIS: tl.constexpr):
    """Return along an axis how far away the keys of a tile's queries lie: (least, number of distances)."""
    KERNEL: tl.constexpr = window.KERNEL[AXIS]
    i, n = i[AXIS], n[AXIS]
    least = tl.min(tl.where(m_i, first_key(i, n, window, AXIS) - i, KERNEL - 1), axis=0)
    most = tl.max(tl.where(m_i, key_stop(i, n, window, AXIS) - 1 - i, 1 - KERNEL), axis=0)
    return least, tl.maximum(most - least + 1, 0)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def bias_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_lse, p_do, p_delta, p_dbias, scale, N0, N1, N2, heads, group, s_q, s_k, s_v, s_o,
    window: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dbias[o] = sum_i ds_(i, i + o)`: a tile of queries' part in the gradient of the table of position biases.

    For one distance after another, each query with the one key so far away: the sum over a tile is then no scatter.
    Writes (batch x heads x tiles, TABLE); entries that no query of the tile reaches are left as they are.
    Grid: (batch x heads x tiles of the maps of all residue classes).
    """
    i_b, i_h, _first, r, n, i, m_i = _tile((N0, N1, N2), heads, window, blocks)
    p_k = _head(p_k, s_k, i_b, i_h // group)
    p_v = _head(p_v, s_v, i_b, i_h // group)
    o_i = _numbers(i, r, i_b, i_h, (N0, N1, N2), heads, window)
    o_q, o_do = offsets(i, r, s_q.axes, window), offsets(i, r, s_o.axes, window)
    b_q = _load(_head(p_q, s_q, i_b, i_h), o_q, s_q, m_i, channels.DK, channels.BK)
    b_do = _load(_head(p_do, s_o, i_b, i_h), o_do, s_o, m_i, channels.DV, channels.BV)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0)
    b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
    l0, w0 = _reach(i, m_i, n, window, 0)
    l1, w1 = _reach(i, m_i, n, window, 1)
    l2, w2 = _reach(i, m_i, n, window, 2)
    p_dbias += tl.program_id(0).to(tl.int64) * window.TABLE
    for step in range(w0 * w1 * w2):
        far = box_tokens(step, (l0, l1, l2), (w0, w1, w2))
        j = (i[0] + far[0], i[1] + far[1], i[2] + far[2])
        m_j = m_i & visible(i, j, n, window)
        b_k = _load(p_k, offsets(j, r, s_k.axes, window), s_k, m_j, channels.DK, channels.BK)
        b_v = _load(p_v, offsets(j, r, s_v.axes, window), s_v, m_j, channels.DV, channels.BV)
        index = bias_index((0, 0, 0), far, window)
        b_bias = tl.load(p_bias + i_h * window.TABLE + index).to(tl.float32)
        b_s = tl.where(m_j, tl.sum(b_q * b_k, axis=1) * scale + b_bias, float("-inf"))
        _, b_ds = _score_gradients(b_s, b_lse, tl.sum(b_do * b_v, axis=1), b_delta)
        tl.store(p_dbias + index, tl.sum(b_ds, axis=0))
