"""The Triton kernels of neighborhood attention where the whole box of a tile fits one block; `triton_boxes.py` chooses.

A tile of queries sees a box of keys, and a tile of keys is seen by a box of queries. Every score of a tile lies in
registers at once, so the softmax takes one pass, and which queries see which keys, with which bias, is a table: (rows
of the tile, columns of the box), the bias times log2(e), -inf where a query does not see a key. Along an axis tiles
look alike except near the ends of their class; those that look alike share a kind, so that there are few tables, and a
program that goes over several images loads one once.

Names are those of `triton_kernels.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from visionmix.kernels.neighborhood_attention import triton_windows as on_map
from visionmix.kernels.neighborhood_attention.triton_windows import (
    columns,
    find_box,
    find_tile,
    load_channels,
    offsets,
    rows,
    store_channels,
    tile_tokens,
)
from visionmix.kernels.triton_products import LOG2_E, dot, zeros


class Box(NamedTuple):
    """A tile of tokens and the box of those on the other side, a constant of every kernel.

    Attributes:
        TILE: A tile's tokens along each axis.
        ROWS: A tile's tokens in all.
        WIDTH: The largest box's tokens along each axis.
        COLUMNS: Scores of a row: the largest box's tokens in all, padded to a power of two.
        BEFORE: How near the start of each axis a tile's windows are cut or shifted.
        AFTER: How near the end.
        INVERSE: Whether the tile holds keys and the box queries.
    """

    TILE: tuple[int, int, int]
    ROWS: int
    WIDTH: tuple[int, int, int]
    COLUMNS: int
    BEFORE: tuple[int, int, int]
    AFTER: tuple[int, int, int]
    INVERSE: bool


@triton.jit
def _last_inner(n, TILE: tl.constexpr, AFTER: tl.constexpr):
    """The last tile of an axis that ends AFTER or more tokens before the end of its class; -1 if there is none."""
    return tl.maximum(n - AFTER, 0) // TILE - 1


@triton.jit
def _kind(first, n, size, window: tl.constexpr, box: tl.constexpr, AXIS: tl.constexpr):
    """Number along an axis the kind of the tile that starts at token `first`.

    Each tile that starts less than BEFORE tokens after the start or ends less than AFTER before the end is a kind of
    its own, the others are one. Classes of a dilated axis have one of two lengths.
    """
    TILE: tl.constexpr = box.TILE[AXIS]
    DILATION: tl.constexpr = window.DILATION[AXIS]
    # A tile past the end of a shorter class has no tokens: any kind will do.
    number = tl.minimum(first // TILE, tl.cdiv(n, TILE) - 1)
    least: tl.constexpr = (box.BEFORE[AXIS] + TILE - 1) // TILE
    kind = tl.minimum(number, least)
    kind += tl.maximum(number - tl.maximum(least, _last_inner(n, TILE, box.AFTER[AXIS])), 0)
    return kind if DILATION == 1 else 2 * kind + (n < tl.cdiv(size, tl.minimum(size, DILATION)))


@triton.jit
def _first_of_kind(kind, size, window: tl.constexpr, box: tl.constexpr, AXIS: tl.constexpr):
    """Return (first token, class length) of a tile of the kind; past the end where the axis has none."""
    TILE: tl.constexpr = box.TILE[AXIS]
    DILATION: tl.constexpr = window.DILATION[AXIS]
    if DILATION == 1:
        n = size
    else:
        n = tl.maximum(tl.cdiv(size, tl.minimum(size, DILATION)) - kind % 2, 1)
        kind = kind // 2
    least: tl.constexpr = (box.BEFORE[AXIS] + TILE - 1) // TILE
    last = tl.maximum(least, _last_inner(n, TILE, box.AFTER[AXIS]))
    return tl.where(kind <= least, kind, kind - least + last) * TILE, n


@triton.jit
def _box_tokens(first, n, window: tl.constexpr, box: tl.constexpr):
    """Return the tokens of a tile's box, one for each column, and which of them the class has."""
    WIDTH: tl.constexpr = box.WIDTH
    low, _, _ = find_box(first, n, window, box, box.INVERSE)
    o_n = tl.arange(0, box.COLUMNS)
    j = on_map.box_tokens(o_n, low, WIDTH)
    return j, (o_n < WIDTH[0] * WIDTH[1] * WIDTH[2]) & (j[0] < n[0]) & (j[1] < n[1]) & (j[2] < n[2])


@triton.jit
def _score_offsets(box: tl.constexpr):
    """The offsets of the (ROWS, COLUMNS) scores of a tile."""
    return tl.arange(0, box.ROWS)[:, None] * box.COLUMNS + tl.arange(0, box.COLUMNS)[None, :]


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def box_table_kernel(p_bias, p_table, N0, N1, N2, kinds, window: tl.constexpr, box: tl.constexpr):
    """`table[kind, head, row, column] = bias[head, key - query] log2(e)`, -inf where the query does not see the key.

    Rows are the queries of a tile and columns the keys of its box, with INVERSE the other way round.
    Grid: (kinds of tiles, heads, or 1 without bias).
    """
    index, i_h = tl.program_id(0), tl.program_id(1)
    f2, n2 = _first_of_kind(index % kinds[2], N2, window, box, 2)
    index //= kinds[2]
    f1, n1 = _first_of_kind(index % kinds[1], N1, window, box, 1)
    f0, n0 = _first_of_kind(index // kinds[1], N0, window, box, 0)
    first, n = (f0, f1, f2), (n0, n1, n2)
    i, m_i = tile_tokens(first, n, box)
    j, m_j = _box_tokens(first, n, window, box)
    if box.INVERSE:
        queries, keys = columns(j), rows(i)
    else:
        queries, keys = rows(i), columns(j)
    m_pairs = m_i[:, None] & m_j[None, :]
    m_pairs &= on_map.visible(queries, keys, n, window)
    b_table = tl.zeros(m_pairs.shape, tl.float32)
    if p_bias is not None:
        o_b = i_h * window.TABLE + on_map.bias_index(queries, keys, window)
        b_table += tl.load(p_bias + o_b, mask=m_pairs, other=0.0).to(tl.float32)
    b_table = tl.where(m_pairs, b_table * LOG2_E, float("-inf"))
    o_t = (tl.program_id(0) * tl.num_programs(1) + i_h) * (box.ROWS * box.COLUMNS)
    tl.store(p_table + o_t + _score_offsets(box), b_table)


@triton.jit
def _place(i_h, sizes, kinds, table_heads, window: tl.constexpr, box: tl.constexpr):
    """Return of this program (tile tokens, mask, box tokens, mask, residues, offsets in the tables (rows, columns))."""
    _, first, r, n = find_tile(sizes, window, box)
    i, m_i = tile_tokens(first, n, box)
    j, m_j = _box_tokens(first, n, window, box)
    kind = _kind(first[0], n[0], sizes[0], window, box, 0) * kinds[1]
    kind += _kind(first[1], n[1], sizes[1], window, box, 1)
    kind = kind * kinds[2] + _kind(first[2], n[2], sizes[2], window, box, 2)
    o_t = (kind * table_heads + tl.minimum(i_h, table_heads - 1)) * (box.ROWS * box.COLUMNS)
    return i, m_i, j, m_j, r, o_t + _score_offsets(box)


@triton.jit
def _head(p_x, s_x, i_h, i, r, window: tl.constexpr):
    """Return a head's pointer in the first image and the tokens' offsets from it; 32 bits, half the registers."""
    return p_x + i_h.to(tl.int64) * s_x.head, offsets(i, r, s_x.axes, window, tl.int32)


@triton.jit
def _softmax(b_s, m_i):
    """Return of scores times log2(e) (exponentials, largest score, sum of exponentials); 1 is the sum of no query."""
    b_most = tl.max(b_s, axis=1)
    # The keys of a query may all have a bias of -inf; a row outside the map has none.
    b_finite = tl.where(b_most == float("-inf"), 0.0, b_most)
    b_p = tl.exp2(b_s - b_finite[:, None])
    return b_p, b_most, tl.where(m_i, tl.sum(b_p, axis=1), 1.0)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "batch", "images"])
def box_forward_kernel(
    p_q, p_k, p_v, p_table, p_out, p_lse, scale, N0, N1, N2, kinds, table_heads, batch, images, group, s_q, s_k, s_v,
    window: tl.constexpr, box: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j softmax_j(scale q_i . k_j + bias) v_j` and the log-sum-exp of the scores.

    Grid: (tiles of queries of the maps of all residue classes, heads, groups of `images` images).
    """
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    i, m_i, j, m_j, r, o_t = _place(i_h, (N0, N1, N2), kinds, table_heads, window, box)
    p_q, o_q = _head(p_q, s_q, i_h, i, r, window)
    p_k, o_k = _head(p_k, s_k, i_h // group, j, r, window)
    p_v, o_v = _head(p_v, s_v, i_h // group, j, r, window)
    o_i = offsets(i, r, (N1 * N2 * heads, N2 * heads, heads), window, tl.int32) + i_h
    # (queries, keys); in the loop (queries, BK), (keys, BK) and (keys, BV)
    b_table = tl.load(p_table + o_t)
    for step in range(tl.minimum(images, batch - tl.program_id(2) * images)):
        i_b = (tl.program_id(2) * images).to(tl.int64) + step
        b_q = load_channels(p_q + i_b * s_q.batch, o_q, m_i, s_q.dim, channels.DK, channels.BK)
        b_k = load_channels(p_k + i_b * s_k.batch, o_k, m_j, s_k.dim, channels.DK, channels.BK)
        b_v = load_channels(p_v + i_b * s_v.batch, o_v, m_j, s_v.dim, channels.DV, channels.BV)
        b_s = dot(b_q, tl.trans(b_k), channels) * (scale * LOG2_E) + b_table
        b_p, b_most, b_sum = _softmax(b_s, m_i)
        # A NaN in a key, or an infinity, must stay with the queries that see it, but for others it is NaN - inf here.
        if tl.max(tl.where(b_sum == b_sum, 0, 1), axis=0) > 0:
            b_s = tl.where(b_table == float("-inf"), float("-inf"), b_s)
            b_p, b_most, b_sum = _softmax(b_s, m_i)
        o_b = i_b * (N0 * N1 * N2 * heads)
        b_out = dot(b_p, b_v, channels) * (1.0 / b_sum)[:, None]
        store_channels(p_out + o_b * channels.DV, b_out, o_i * channels.DV, m_i, channels.DV, channels.BV)
        tl.store(p_lse + o_b + o_i, (b_most + tl.log2(b_sum)) / LOG2_E, mask=m_i)


@triton.jit
def _row_gradients(b_s, b_lse, b_from_value, b_delta):
    """Return the probabilities and the gradients of the scores, from scores times log2(e)."""
    b_p = tl.exp2(b_s - b_lse * LOG2_E)
    return b_p, b_p * (b_from_value - b_delta)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "batch", "images"])
def box_query_gradients_kernel(
    p_q, p_k, p_v, p_table, p_out, p_lse, p_do, p_dlse, p_delta, p_dq, p_dtable, scale, N0, N1, N2, kinds, table_heads,
    batch, images, group, s_q, s_k, s_v, s_o, window: tl.constexpr, box: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dq_i = scale sum_j ds_ij k_j`, `delta_i = out_i . grad_out_i - grad_lse_i`, and ds summed over the images.

    The gradient of a score is `ds_ij = p_ij (grad_out_i . v_j - delta_i)`; its sums are (groups, heads, tiles, queries
    of a tile, columns), float32.
    Grid: (tiles of queries of the maps of all residue classes, heads, groups of `images` images).
    """
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    i, m_i, j, m_j, r, o_t = _place(i_h, (N0, N1, N2), kinds, table_heads, window, box)
    p_do, o_do = _head(p_do, s_o, i_h, i, r, window)
    p_q, o_q = _head(p_q, s_q, i_h, i, r, window)
    p_k, o_k = _head(p_k, s_k, i_h // group, j, r, window)
    p_v, o_v = _head(p_v, s_v, i_h // group, j, r, window)
    o_i = offsets(i, r, (N1 * N2 * heads, N2 * heads, heads), window, tl.int32) + i_h
    # (queries, keys)
    b_dtable = tl.zeros(o_t.shape, tl.float32)
    for step in range(tl.minimum(images, batch - tl.program_id(2) * images)):
        i_b = (tl.program_id(2) * images).to(tl.int64) + step
        o_b = i_b * (N0 * N1 * N2 * heads)
        # (queries, BV) and (keys, BV)
        b_do = load_channels(p_do + i_b * s_o.batch, o_do, m_i, s_o.dim, channels.DV, channels.BV)
        b_v = load_channels(p_v + i_b * s_v.batch, o_v, m_j, s_v.dim, channels.DV, channels.BV)
        b_from_value = dot(b_do, tl.trans(b_v), channels)
        b_out = load_channels(p_out + o_b * channels.DV, o_i * channels.DV, m_i, 1, channels.DV, channels.BV)
        b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), axis=1)
        b_delta -= tl.load(p_dlse + o_b + o_i, mask=m_i, other=0.0)
        tl.store(p_delta + o_b + o_i, b_delta, mask=m_i)
        b_lse = tl.load(p_lse + o_b + o_i, mask=m_i, other=0.0)
        # (queries, BK) and (keys, BK)
        b_q = load_channels(p_q + i_b * s_q.batch, o_q, m_i, s_q.dim, channels.DK, channels.BK)
        b_k = load_channels(p_k + i_b * s_k.batch, o_k, m_j, s_k.dim, channels.DK, channels.BK)
        # Held from image to image it would take a quarter of the registers, and spill.
        b_table = tl.load(p_table + o_t)
        b_s = dot(b_q, tl.trans(b_k), channels) * (scale * LOG2_E) + b_table
        _, b_ds = _row_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
        if p_dtable is not None:
            b_dtable += b_ds
        b_dq = dot(b_ds, b_k, channels) * scale
        store_channels(p_dq + o_b * channels.DK, b_dq, o_i * channels.DK, m_i, channels.DK, channels.BK)
    if p_dtable is not None:
        i_p = (tl.program_id(2).to(tl.int64) * heads + i_h) * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_dtable + i_p * (box.ROWS * box.COLUMNS) + _score_offsets(box), b_dtable)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "groups"])
def box_bias_gradients_kernel(
    p_dtable, p_dbias, N0, N1, N2, groups, window: tl.constexpr, box: tl.constexpr, BLOCK: tl.constexpr
):
    """`dbias[o] = sum_i ds_(i, i + o)` over the queries i of a tile and the groups of images, for BLOCK distances o.

    Writes (heads, tiles, distances).
    Grid: (tiles of queries of the maps of all residue classes, heads, blocks of distances).
    """
    _, first, _, n = find_tile((N0, N1, N2), window, box)
    low, _, _ = find_box(first, n, window, box, False)
    i, _ = tile_tokens(first, n, box)
    i0, i1, i2 = rows(i)
    W1: tl.constexpr = 2 * window.KERNEL[1] - 1
    W2: tl.constexpr = 2 * window.KERNEL[2] - 1
    SCORES: tl.constexpr = box.ROWS * box.COLUMNS
    o_o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # Where in its row of the box lies the key at a distance from a query: (queries, BLOCK).
    j0 = i0 + (o_o // (W1 * W2) - (window.KERNEL[0] - 1))[None, :] - low[0]
    j1 = i1 + (o_o // W2 % W1 - (window.KERNEL[1] - 1))[None, :] - low[1]
    j2 = i2 + (o_o % W2 - (window.KERNEL[2] - 1))[None, :] - low[2]
    m_o = (o_o < window.TABLE)[None, :] & (j0 >= 0) & (j0 < box.WIDTH[0]) & (j1 >= 0) & (j1 < box.WIDTH[1])
    m_o &= (j2 >= 0) & (j2 < box.WIDTH[2])
    o_x = tl.arange(0, box.ROWS)[:, None] * box.COLUMNS + (j0 * box.WIDTH[1] + j1) * box.WIDTH[2] + j2
    i_t = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_dtable += i_t * SCORES
    b_sum = zeros(box.ROWS, BLOCK)
    for _ in range(groups):
        b_sum += tl.load(p_dtable + o_x, mask=m_o, other=0.0)
        p_dtable += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * SCORES
    tl.store(p_dbias + i_t * window.TABLE + o_o, tl.sum(b_sum, axis=0), mask=o_o < window.TABLE)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "batch", "images"])
def box_key_gradients_kernel(
    p_q, p_k, p_v, p_table, p_lse, p_do, p_delta, p_dk, p_dv, scale, N0, N1, N2, kinds, table_heads,
    batch, images, s_q, s_k, s_v, s_o, window: tl.constexpr, box: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """`dk_j = scale sum_i ds_ij q_i`, `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`.

    Grid: (tiles of keys of the maps of all residue classes, heads, groups of `images` images).
    """
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    j, m_j, i, m_i, r, o_t = _place(i_h, (N0, N1, N2), kinds, table_heads, window, box)
    p_q, o_q = _head(p_q, s_q, i_h, i, r, window)
    p_k, o_k = _head(p_k, s_k, i_h, j, r, window)
    p_v, o_v = _head(p_v, s_v, i_h, j, r, window)
    p_do, o_do = _head(p_do, s_o, i_h, i, r, window)
    tokens = (N1 * N2 * heads, N2 * heads, heads)
    o_i, o_j = offsets(i, r, tokens, window, tl.int32) + i_h, offsets(j, r, tokens, window, tl.int32) + i_h
    # (keys, queries)
    if channels.PRECISION != "tf32x3":
        b_table = tl.load(p_table + o_t)
    for step in range(tl.minimum(images, batch - tl.program_id(2) * images)):
        i_b = (tl.program_id(2) * images).to(tl.int64) + step
        # (keys, BK) and (queries, BK)
        b_k = load_channels(p_k + i_b * s_k.batch, o_k, m_j, s_k.dim, channels.DK, channels.BK)
        b_q = load_channels(p_q + i_b * s_q.batch, o_q, m_i, s_q.dim, channels.DK, channels.BK)
        if channels.PRECISION == "tf32x3":
            # Three parts of each operand leave no registers for it from image to image.
            b_table = tl.load(p_table + o_t)
        b_s = dot(b_k, tl.trans(b_q), channels) * (scale * LOG2_E) + b_table
        # (keys, BV) and (queries, BV)
        b_v = load_channels(p_v + i_b * s_v.batch, o_v, m_j, s_v.dim, channels.DV, channels.BV)
        b_do = load_channels(p_do + i_b * s_o.batch, o_do, m_i, s_o.dim, channels.DV, channels.BV)
        b_from_value = dot(b_v, tl.trans(b_do), channels)
        o_b = i_b * (N0 * N1 * N2 * heads)
        b_lse = tl.load(p_lse + o_b + o_i, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + o_b + o_i, mask=m_i, other=0.0)
        b_p, b_ds = _row_gradients(b_s, b_lse[None, :], b_from_value, b_delta[None, :])
        b_dv = dot(b_p, b_do, channels)
        store_channels(p_dv + o_b * channels.DV, b_dv, o_j * channels.DV, m_j, channels.DV, channels.BV)
        b_dk = dot(b_ds, b_q, channels) * scale
        store_channels(p_dk + o_b * channels.DK, b_dk, o_j * channels.DK, m_j, channels.DK, channels.BK)
