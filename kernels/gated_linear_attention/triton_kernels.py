"""The Triton kernels of gated linear attention; `triton.py` launches them and says how they work together.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s_: one tuple a tensor, of (batch, length,
heads, dim). `i` and `j` are a chunk's tokens, in rows and columns, numbered in the direction's time.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from visionmix.kernels.triton_products import INTERPRETED, LOG2_E, dot, operand, round_to_bfloat16, zeros

# Sums of gates between a chunk's middle and its tokens, times log2(e), up to which the chunk's weights are one product:
# its factors stay below 2^60, which float32 and bfloat16 hold.
GENTLE = tl.constexpr(60.0)
# Gates below stand for a decay of 0, as -inf does, which times the zeros of a triangle would be NaN.
LEAST_GATE = tl.constexpr(-30000.0)

# Numbers of a direction's tiles in `ones` (tiles, CHUNK, CHUNK), see `triton.py`: a row's sum is over the tokens up to
# it, over those after it, or from the chunk's middle to it; then, for segments of 1, 2, ... tokens, both of the first.
UPTO, AFTER, MIDDLE, SEGMENTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Tiles(NamedTuple):
    """A program's tiles and the products of them, a constant of every kernel.

    Attributes:
        DK: Channels of a query and a key.
        DV: Channels of a value.
        BK: Channels of a tile of queries or keys.
        BV: Channels of a tile of values.
        LEVELS: The levels of a chunk's segments.
        CHUNK: Tokens of a chunk, 2^LEVELS.
        TYPE: The type of the products' operands; sums are float32.
        PRECISION: The precision of products of float32 operands.
        GATE_PARTS: Values in bfloat16 whose sum is a gate.
        OFFSET: The type that holds the offsets inside a chunk.
    """

    DK: int
    DV: int
    BK: int
    BV: int
    LEVELS: int
    CHUNK: int
    TYPE: tl.dtype
    PRECISION: str
    GATE_PARTS: int
    OFFSET: tl.dtype


@triton.jit
def _chunk(p_x, s_x, i_row, heads, i_c, tiles: tl.constexpr):
    """The pointer to the first token of chunk i_c of row i_row = (batch, head)."""
    return p_x + (i_row // heads) * s_x[0] + (i_row % heads) * s_x[2] + i_c * tiles.CHUNK * s_x[1]


@triton.jit
def _offsets(s_x, o_d, left, SIZE: tl.constexpr, tiles: tl.constexpr):
    """Offsets of a chunk's tokens and the dims o_d from the chunk's pointer, and which of them exist."""
    o_t = tl.arange(0, tiles.CHUNK)
    o_x = o_t[:, None].to(tiles.OFFSET) * s_x[1] + o_d[None, :].to(tiles.OFFSET) * s_x[3]
    return o_x, (o_t < left)[:, None] & (o_d < SIZE)[None, :]


@triton.jit
def _load(p_x, s_x, o_d, left, SIZE: tl.constexpr, tiles: tl.constexpr):
    """The (CHUNK, dims) tile of a chunk's tokens and the dims o_d, 0 outside."""
    o_x, m_x = _offsets(s_x, o_d, left, SIZE, tiles)
    return tl.load(p_x + o_x, mask=m_x, other=0.0)


@triton.jit
def _load_gates(p_g, s_g, o_k, left, tiles: tl.constexpr):
    return tl.maximum(_load(p_g, s_g, o_k, left, tiles.DK, tiles).to(tl.float32), LEAST_GATE)


@triton.jit
def _store(p_x, s_x, b_x, o_d, left, SIZE: tl.constexpr, tiles: tl.constexpr):
    o_x, m_x = _offsets(s_x, o_d, left, SIZE, tiles)
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _load_state(p_s, o_k, o_v, tiles: tl.constexpr):
    """The tile of rows o_k and columns o_v of one (DK, DV) state, 0 outside."""
    m_s = (o_k < tiles.DK)[:, None] & (o_v < tiles.DV)[None, :]
    return tl.load(p_s + o_k[:, None] * tiles.DV + o_v[None, :], mask=m_s, other=0.0)


@triton.jit
def _sums(p_ones, tile, b_x, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """Sums of rows of b_x (CHUNK, dims), which is the sum of PARTS bfloat16 values: a product with zeros and ones."""
    o_t = tl.arange(0, CHUNK)
    b_ones = tl.load(p_ones + tile * CHUNK * CHUNK + o_t[:, None] * CHUNK + o_t[None, :])
    if INTERPRETED:
        b_ones = b_ones.to(tl.float32)
    b_part = round_to_bfloat16(b_x)
    b_sum = tl.dot(b_ones, b_part)
    for _ in tl.static_range(1, PARTS):
        b_x -= b_part.to(tl.float32)
        b_part = round_to_bfloat16(b_x)
        b_sum = tl.dot(b_ones, b_part, b_sum)
    return b_sum


@triton.jit
def _decay(p_ones, tile, b_g, tiles: tl.constexpr):
    return tl.exp2(_sums(p_ones, tile, b_g, tiles.CHUNK, tiles.GATE_PARTS) * LOG2_E)


@triton.jit
def _times(CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """A chunk's tokens, as rows and columns, numbered in the direction's time."""
    o_t = tl.arange(0, CHUNK)
    if REVERSE:
        o_t = CHUNK - 1 - o_t
    return o_t[:, None], o_t[None, :]


@triton.jit
def _pairs(i, j, segment):
    """Where j lies in an even segment of that many tokens and i in the segment after it."""
    return ((i ^ j) & -segment == segment) & (i > j)


@triton.jit
def _weights(p_ones, b_x, b_y, b_g, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, tiles: tl.constexpr):
    """The weights (CHUNK, CHUNK) of a chunk's queries b_x (rows) for its keys b_y (columns) in one direction.

    TRANSPOSED: keys are rows, queries columns. Where sums of gates are moderate, a pair's decay is that from the key to
    the chunk's middle times that from there to the query: one may grow where the other shrinks. Else it is found by
    levels: each pair belongs to exactly one segment length s = 1, 2, 4, ... for which the key lies in an even segment
    and the query in the next, so that both decays, to the first one's end and from there on, are at most 1.
    """
    FIRST: tl.constexpr = (SEGMENTS + 2 * tiles.LEVELS) * (1 if REVERSE else 0)
    i, j = _times(tiles.CHUNK, REVERSE)
    if TRANSPOSED:
        i, j = j, i
    b_sum = _sums(p_ones, FIRST + MIDDLE, b_g, tiles.CHUNK, tiles.GATE_PARTS) * LOG2_E
    if TRANSPOSED:
        b_sum = -b_sum
    b_w = dot(b_x * tl.exp2(b_sum), tl.trans(b_y * tl.exp2(-b_sum)), tiles)
    b_w = tl.where(i >= j, b_w, 0.0)
    if tiles.PRECISION == "tf32x3":
        # Three products for each, in both branches, would not fit the registers.
        strong = True
    else:
        strong = tl.max(tl.abs(b_sum)) > GENTLE
    if strong:
        b_w = tl.where(i == j, dot(b_x, tl.trans(b_y), tiles), 0.0)
        for level in range(tiles.LEVELS):
            b_late = _decay(p_ones, FIRST + SEGMENTS + 2 * level + UPTO, b_g, tiles)
            b_early = _decay(p_ones, FIRST + SEGMENTS + 2 * level + AFTER, b_g, tiles)
            if TRANSPOSED:
                b_late, b_early = b_early, b_late
            b_level = dot(b_x * b_late, tl.trans(b_y * b_early), tiles)
            b_w = tl.where(_pairs(i, j, 1 << level), b_level, b_w)
    return b_w


@triton.jit(do_not_specialize=["length"])
def states_kernel(
    p_ones, p_x, p_y, p_g, p_g2, p_first, p_states, p_last, s_x, s_y, s_g, s_g2, scale, length, heads,
    KEYS: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """`S <- diag(decay of the chunk) S + sum_t (scale x_t decay_t)^T y_t` over the chunks, one program per direction.

    x = k, y = v with KEYS (decayed to the chunk's far end), x = q, y = grad_out without (decayed from its near end),
    against the direction's time. Writes the S before each chunk to `states` (directions, batch x heads, chunks, DK, DV)
    and the S after all of them to `last`.
    Grid: (batch x heads, tiles of DK x tiles of DV, directions).
    """
    i_row = tl.program_id(0).to(tl.int64)
    tiles_v = tl.cdiv(tiles.DV, tiles.BV)
    o_k = (tl.program_id(1) // tiles_v) * tiles.BK + tl.arange(0, tiles.BK)
    o_v = (tl.program_id(1) % tiles_v) * tiles.BV + tl.arange(0, tiles.BV)
    second = tl.program_id(2) == 1
    down = second == KEYS
    if p_g2 is not None:
        s_g = (
            tl.where(second, s_g2[0], s_g[0]),
            tl.where(second, s_g2[1], s_g[1]),
            tl.where(second, s_g2[2], s_g[2]),
            tl.where(second, s_g2[3], s_g[3]),
        )
        if second:
            p_g = p_g2
    # (BK, BV)
    o_s = o_k[:, None] * tiles.DV + o_v[None, :]
    m_s = (o_k < tiles.DK)[:, None] & (o_v < tiles.DV)[None, :]
    if p_first is not None:
        b_s = tl.load(p_first + i_row * tiles.DK * tiles.DV + o_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = zeros(tiles.BK, tiles.BV)
    chunks = tl.cdiv(length, tiles.CHUNK)
    i_s = (tl.program_id(2) * tl.num_programs(0).to(tl.int64) + i_row) * chunks
    i_tile = tl.program_id(2) * (SEGMENTS + 2 * tiles.LEVELS) + (AFTER if KEYS else UPTO)
    for step in range(chunks):
        i_c = tl.cast(chunks - 1 - step if down else step, tl.int64)
        left = length - i_c * tiles.CHUNK
        if p_states is not None:
            tl.store(p_states + (i_s + i_c) * tiles.DK * tiles.DV + o_s, b_s.to(p_states.dtype.element_ty), mask=m_s)
        # (CHUNK, BK), (CHUNK, BV) and (CHUNK, BK)
        b_x = _load(_chunk(p_x, s_x, i_row, heads, i_c, tiles), s_x, o_k, left, tiles.DK, tiles)
        b_y = _load(_chunk(p_y, s_y, i_row, heads, i_c, tiles), s_y, o_v, left, tiles.DV, tiles)
        b_g = _load_gates(_chunk(p_g, s_g, i_row, heads, i_c, tiles), s_g, o_k, left, tiles)
        b_x = b_x * _decay(p_ones, i_tile, b_g, tiles) * scale
        b_s *= tl.exp2(tl.sum(b_g, axis=0) * LOG2_E)[:, None]
        b_s += dot(tl.trans(b_x), b_y, tiles)
        if p_last is not None and tiles.TYPE.is_bf16():
            # The remainder of the rounding, so that the last state is as precise as float32 sums make it.
            b_s += dot(tl.trans(b_x - round_to_bfloat16(b_x).to(tl.float32)), b_y, tiles)
    if p_last is not None:
        tl.store(p_last + i_row * tiles.DK * tiles.DV + o_s, b_s.to(p_last.dtype.element_ty), mask=m_s)


@triton.jit
def _far(p_ones, b_x, b_g, scale, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, tiles: tl.constexpr):
    """The queries decayed from the chunk's start, times scale; TRANSPOSED: the keys decayed to its end."""
    FIRST: tl.constexpr = (SEGMENTS + 2 * tiles.LEVELS) * (1 if REVERSE else 0)
    if TRANSPOSED:
        b_far = b_x * _decay(p_ones, FIRST + AFTER, b_g, tiles)
    else:
        b_far = b_x * _decay(p_ones, FIRST + UPTO, b_g, tiles) * scale
    return b_far


@triton.jit(do_not_specialize=["length"])
def mix_kernel(
    p_ones, p_x, p_y, p_v, p_g, p_g2, p_states, p_out, s_x, s_y, s_v, s_g, s_g2, s_out, scale, length, heads,
    TRANSPOSED: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """`out = scale (W v + (q decay) S)`, W the weights of a chunk's queries x = q for its keys y = k.

    TRANSPOSED: the gradient of v, `out = scale W^T v + (k decay) S`, x = k, y = q, v = grad_out, S the gradients of the
    states. With `g2`, the gates of the other direction, both directions' terms are added up.
    Grid: (batch x heads, chunks).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1).to(tl.int64)
    left = length - i_c * tiles.CHUNK
    p_x, p_y = _chunk(p_x, s_x, i_row, heads, i_c, tiles), _chunk(p_y, s_y, i_row, heads, i_c, tiles)
    p_v, p_g = _chunk(p_v, s_v, i_row, heads, i_c, tiles), _chunk(p_g, s_g, i_row, heads, i_c, tiles)
    p_out = _chunk(p_out, s_out, i_row, heads, i_c, tiles)
    o_k = tl.arange(0, tiles.BK)
    # (CHUNK, BK)
    b_x = _load(p_x, s_x, o_k, left, tiles.DK, tiles)
    b_y = _load(p_y, s_y, o_k, left, tiles.DK, tiles)
    b_g = _load_gates(p_g, s_g, o_k, left, tiles)
    b_w = _weights(p_ones, b_x, b_y, b_g, False, TRANSPOSED, tiles)
    b_far = _far(p_ones, b_x, b_g, scale, False, TRANSPOSED, tiles)
    if p_g2 is not None:
        p_g2 = _chunk(p_g2, s_g2, i_row, heads, i_c, tiles)
        b_g = _load_gates(p_g2, s_g2, o_k, left, tiles)
        b_w += _weights(p_ones, b_x, b_y, b_g, True, TRANSPOSED, tiles)
        b_far2 = _far(p_ones, b_x, b_g, scale, True, TRANSPOSED, tiles)
    for o_tile in range(tiles.BK, tiles.DK, tiles.BK):
        o_k = o_tile + tl.arange(0, tiles.BK)
        b_x = _load(p_x, s_x, o_k, left, tiles.DK, tiles)
        b_y = _load(p_y, s_y, o_k, left, tiles.DK, tiles)
        b_g = _load_gates(p_g, s_g, o_k, left, tiles)
        b_w += _weights(p_ones, b_x, b_y, b_g, False, TRANSPOSED, tiles)
        if p_g2 is not None:
            b_g = _load_gates(p_g2, s_g2, o_k, left, tiles)
            b_w += _weights(p_ones, b_x, b_y, b_g, True, TRANSPOSED, tiles)
    b_w = operand(b_w * scale, tiles)
    if p_states is not None:
        p_s = p_states + (i_row * tl.num_programs(1) + i_c) * tiles.DK * tiles.DV
        p_s2 = p_s + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tiles.DK * tiles.DV
    for o_tile in range(0, tiles.DV, tiles.BV):
        o_v = o_tile + tl.arange(0, tiles.BV)
        # (CHUNK, BV)
        b_out = dot(b_w, _load(p_v, s_v, o_v, left, tiles.DV, tiles), tiles)
        if p_states is not None:
            o_k = tl.arange(0, tiles.BK)
            b_out += dot(b_far, _load_state(p_s, o_k, o_v, tiles), tiles)
            if p_g2 is not None:
                b_out += dot(b_far2, _load_state(p_s2, o_k, o_v, tiles), tiles)
            # Of further tiles of x the decayed ones would not fit the registers.
            for o_tile_k in range(tiles.BK, tiles.DK, tiles.BK):
                o_k = o_tile_k + tl.arange(0, tiles.BK)
                b_x = _load(p_x, s_x, o_k, left, tiles.DK, tiles)
                b_g = _load_gates(p_g, s_g, o_k, left, tiles)
                b_more = _far(p_ones, b_x, b_g, scale, False, TRANSPOSED, tiles)
                b_out += dot(b_more, _load_state(p_s, o_k, o_v, tiles), tiles)
                if p_g2 is not None:
                    b_g = _load_gates(p_g2, s_g2, o_k, left, tiles)
                    b_more = _far(p_ones, b_x, b_g, scale, True, TRANSPOSED, tiles)
                    b_out += dot(b_more, _load_state(p_s2, o_k, o_v, tiles), tiles)
        _store(p_out, s_out, b_out, o_v, left, tiles.DV, tiles)


@triton.jit
def _near_gradients(p_ones, b_dw, b_dwt, b_q, b_k, b_g, REVERSE: tl.constexpr, tiles: tl.constexpr):
    """`dq_i = sum_j dW_ij D_ij k_j` and `dk_j = sum_i dW_ij D_ij q_i` over a chunk's pairs of two tokens.

    b_dwt is b_dw, the gradients of the weights, transposed. D is found as in `_weights`.
    """
    FIRST: tl.constexpr = (SEGMENTS + 2 * tiles.LEVELS) * (1 if REVERSE else 0)
    i, j = _times(tiles.CHUNK, REVERSE)
    b_sum = _sums(p_ones, FIRST + MIDDLE, b_g, tiles.CHUNK, tiles.GATE_PARTS) * LOG2_E
    b_late, b_early = tl.exp2(b_sum), tl.exp2(-b_sum)
    b_dq = b_late * dot(tl.where(i > j, b_dw, 0.0), b_k * b_early, tiles)
    b_dk = b_early * dot(tl.where(j > i, b_dwt, 0.0), b_q * b_late, tiles)
    if tiles.PRECISION == "tf32x3":
        # Three products for each, in both branches, would not fit the registers.
        strong = True
    else:
        strong = tl.max(tl.abs(b_sum)) > GENTLE
    if strong:
        b_dq = tl.zeros_like(b_dq)
        b_dk = tl.zeros_like(b_dk)
        for level in range(tiles.LEVELS):
            b_late = _decay(p_ones, FIRST + SEGMENTS + 2 * level + UPTO, b_g, tiles)
            b_early = _decay(p_ones, FIRST + SEGMENTS + 2 * level + AFTER, b_g, tiles)
            b_level = tl.where(_pairs(i, j, 1 << level), b_dw, 0.0)
            b_dq += b_late * dot(b_level, b_k * b_early, tiles)
            b_level = tl.where(_pairs(j, i, 1 << level), b_dwt, 0.0)
            b_dk += b_early * dot(b_level, b_q * b_late, tiles)
    return b_dq, b_dk


@triton.jit
def _direction_gradients(
    p_ones, b_dw, b_dwt, b_q, b_k, b_g, p_v, p_do, p_s, p_ds, s_v, s_do, o_k, left, scale,
    REVERSE: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """One direction's gradients of q and k, but for each token with itself, and of its gates."""
    TILES: tl.constexpr = SEGMENTS + 2 * tiles.LEVELS
    FIRST: tl.constexpr = TILES * (1 if REVERSE else 0)
    SUM_PARTS: tl.constexpr = 2 if tiles.TYPE.is_bf16() else 3
    b_total = tl.exp2(tl.sum(b_g, axis=0) * LOG2_E)
    b_dq, b_dk = _near_gradients(p_ones, b_dw, b_dwt, b_q, b_k, b_g, REVERSE, tiles)
    # A gate scales what passes from the tokens before it to those from it on: all pairs of them, which are all that
    # the later tokens' queries see less what their keys give among themselves.
    b_dg = b_q * b_dq - b_k * b_dk
    if p_s is not None:
        b_far_q = zeros(tiles.CHUNK, tiles.BK)
        b_far_k = zeros(tiles.CHUNK, tiles.BK)
        b_through = tl.zeros_like(b_total)
        for o_tile in range(0, tiles.DV, tiles.BV):
            o_v = o_tile + tl.arange(0, tiles.BV)
            # (BK, BV), (BK, BV), (CHUNK, BV) and (CHUNK, BV)
            b_s = _load_state(p_s, o_k, o_v, tiles)
            b_ds = _load_state(p_ds, o_k, o_v, tiles)
            b_do = _load(p_do, s_do, o_v, left, tiles.DV, tiles)
            b_v = _load(p_v, s_v, o_v, left, tiles.DV, tiles)
            b_far_q += dot(b_do, tl.trans(b_s), tiles)
            b_far_k += dot(b_v, tl.trans(b_ds), tiles)
            b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        b_far_q *= _decay(p_ones, FIRST + UPTO, b_g, tiles) * scale
        b_far_k *= _decay(p_ones, FIRST + AFTER, b_g, tiles)
        b_dq += b_far_q
        b_dk += b_far_k
        # Later tokens are those up to this one in the other direction's time.
        b_dg = _sums(p_ones, TILES - FIRST + UPTO, b_dg + b_q * b_far_q, tiles.CHUNK, SUM_PARTS)
        b_dg += _sums(p_ones, TILES - FIRST + AFTER, b_k * b_far_k, tiles.CHUNK, SUM_PARTS)
        b_dg += (b_total * b_through)[None, :]
    else:
        b_dg = _sums(p_ones, TILES - FIRST + UPTO, b_dg, tiles.CHUNK, SUM_PARTS)
    return b_dq, b_dk, b_dg


@triton.jit(do_not_specialize=["length"])
def gradients_kernel(
    p_ones, p_q, p_k, p_v, p_g, p_g2, p_do, p_s, p_ds, p_dq, p_dk, p_dg, p_dg2,
    s_q, s_k, s_v, s_g, s_g2, s_do, s_out, scale, length, heads, tiles: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and the gates, from `dW = scale do v^T`, the states `s` and theirs, `ds`:

        dq_i = sum_j dW_ij D_ij k_j + scale do_i S^T d_i,  dk_j = sum_i dW_ij D_ij q_i + v_j dS^T e_j,
        dg_t = sum_(j < t <= i) dW_ij q_i D_ij k_j, and what the states pass over t.

    D_ij is the decay from key j to query i, d_i that from the chunk's start to i, e_j that from j to its end; with
    `g2`, the gates of the other direction, dq and dk are sums over both. All outputs have the strides s_out.
    Grid: (batch x heads, chunks, tiles of DK).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1).to(tl.int64)
    left = length - i_c * tiles.CHUNK
    p_q, p_dq = _chunk(p_q, s_q, i_row, heads, i_c, tiles), _chunk(p_dq, s_out, i_row, heads, i_c, tiles)
    p_k, p_dk = _chunk(p_k, s_k, i_row, heads, i_c, tiles), _chunk(p_dk, s_out, i_row, heads, i_c, tiles)
    p_v, p_do = _chunk(p_v, s_v, i_row, heads, i_c, tiles), _chunk(p_do, s_do, i_row, heads, i_c, tiles)
    p_g, p_dg = _chunk(p_g, s_g, i_row, heads, i_c, tiles), _chunk(p_dg, s_out, i_row, heads, i_c, tiles)
    if p_g2 is not None:
        p_g2 = _chunk(p_g2, s_g2, i_row, heads, i_c, tiles)
        p_dg2 = _chunk(p_dg2, s_out, i_row, heads, i_c, tiles)
        own = 2 * scale
    else:
        own = scale
    if p_s is not None:
        p_s += (i_row * tl.num_programs(1) + i_c) * tiles.DK * tiles.DV
        p_ds += (i_row * tl.num_programs(1) + i_c) * tiles.DK * tiles.DV
        p_s2 = p_s + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tiles.DK * tiles.DV
        p_ds2 = p_ds + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tiles.DK * tiles.DV
    else:
        p_s2 = p_s
        p_ds2 = p_ds
    b_dw = zeros(tiles.CHUNK, tiles.CHUNK)
    b_dwt = zeros(tiles.CHUNK, tiles.CHUNK)
    b_own = tl.sum(b_dw, axis=1)
    for o_tile in range(0, tiles.DV, tiles.BV):
        o_v = o_tile + tl.arange(0, tiles.BV)
        # (CHUNK, BV)
        b_do = _load(p_do, s_do, o_v, left, tiles.DV, tiles)
        b_v = _load(p_v, s_v, o_v, left, tiles.DV, tiles)
        b_dw += dot(b_do, tl.trans(b_v), tiles)
        b_dwt += dot(b_v, tl.trans(b_do), tiles)
        b_own += tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), axis=1)
    b_dw = operand(b_dw * scale, tiles)
    b_dwt = operand(b_dwt * scale, tiles)
    o_k = tl.program_id(2) * tiles.BK + tl.arange(0, tiles.BK)
    # (CHUNK, BK)
    b_q = _load(p_q, s_q, o_k, left, tiles.DK, tiles)
    b_k = _load(p_k, s_k, o_k, left, tiles.DK, tiles)
    b_g = _load_gates(p_g, s_g, o_k, left, tiles)
    b_dq, b_dk, b_dg = _direction_gradients(
        p_ones, b_dw, b_dwt, b_q, b_k, b_g, p_v, p_do, p_s, p_ds, s_v, s_do, o_k, left, scale, False, tiles
    )  # fmt: skip
    _store(p_dg, s_out, b_dg, o_k, left, tiles.DK, tiles)
    if p_g2 is not None:
        b_g = _load_gates(p_g2, s_g2, o_k, left, tiles)
        b_more_q, b_more_k, b_dg = _direction_gradients(
            p_ones, b_dw, b_dwt, b_q, b_k, b_g, p_v, p_do, p_s2, p_ds2, s_v, s_do, o_k, left, scale, True, tiles
        )  # fmt: skip
        b_dq += b_more_q
        b_dk += b_more_k
        _store(p_dg2, s_out, b_dg, o_k, left, tiles.DK, tiles)
    _store(p_dq, s_out, b_dq + (own * b_own)[:, None] * b_k, o_k, left, tiles.DK, tiles)
    _store(p_dk, s_out, b_dk + (own * b_own)[:, None] * b_q, o_k, left, tiles.DK, tiles)
