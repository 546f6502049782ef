"""The Triton kernels of neighborhood attention where the whole box of a tile fits one block; `triton_boxes.py` chooses.

A tile of queries sees a box of keys, and a tile of keys is seen by a box of queries (INVERSE): `TILE` and `BOX` hold
their tokens along each axis. Every score of a tile lies in registers at once, so the softmax takes one pass, and which
queries see which keys, with which bias, is a table: (rows of the tile, COLUMNS of the box), the bias times log2(e),
-inf where a query does not see a key. Along an axis tiles look alike except near the ends of their class; those that
look alike share a kind, so that there are few tables, and a program that goes over several images loads one once.

Products take operands in TYPE, their sums are float32. Names are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from visionmix.kernels.gpu import interpreting
from visionmix.kernels.neighborhood_attention.triton_windows import (
    LOG2_E,
    bias_index,
    box_tokens,
    columns,
    find_box,
    find_tile,
    rows,
    tile_tokens,
    visible,
)

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _dot(b_x, b_y, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A product of operands rounded to TYPE; the interpreter cannot multiply bfloat16, so it goes back to float32."""
    b_x, b_y = b_x.to(TYPE), b_y.to(TYPE)
    if INTERPRETED:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision=PRECISION)


@triton.jit
def _last_inner(n, TILE: tl.constexpr, AFTER: tl.constexpr):
    """The last tile of an axis that ends AFTER or more tokens before the end of its class; -1 if there is none."""
    return tl.maximum(n - AFTER, 0) // TILE - 1


@triton.jit
def _kind(first, n, size, TILE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, DILATION: tl.constexpr):
    """Number along an axis the kind of the tile that starts at token `first`.

    Each tile that starts less than BEFORE tokens after the start or ends less than AFTER before the end is a kind of
    its own, the others are one. Classes of a dilated axis have one of two lengths.
    """
    # A tile past the end of a shorter class has no tokens: any kind will do.
    number = tl.minimum(first // TILE, tl.cdiv(n, TILE) - 1)
    least: tl.constexpr = (BEFORE + TILE - 1) // TILE
    kind = tl.minimum(number, least) + tl.maximum(number - tl.maximum(least, _last_inner(n, TILE, AFTER)), 0)
    return kind if DILATION == 1 else 2 * kind + (n < tl.cdiv(size, tl.minimum(size, DILATION)))


@triton.jit
def _first_of_kind(kind, size, TILE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, DILATION: tl.constexpr):
    """Return (first token, class length) of a tile of the kind; past the end where the axis has none."""
    if DILATION == 1:
        n = size
    else:
        n = tl.maximum(tl.cdiv(size, tl.minimum(size, DILATION)) - kind % 2, 1)
        kind = kind // 2
    least: tl.constexpr = (BEFORE + TILE - 1) // TILE
    number = tl.where(kind <= least, kind, kind - least + tl.maximum(least, _last_inner(n, TILE, AFTER)))
    return number * TILE, n


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def box_table_kernel(
    p_bias, p_table, N0, N1, N2, kinds,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    INVERSE: tl.constexpr, AXES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    CAUSAL: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """`table[kind, head, row, column] = bias[head, key - query] log2(e)`, -inf where the query does not see the key.

    Rows are the queries of a tile and columns the keys of its box, with INVERSE the other way round.
    Grid: (kinds of tiles, heads, or 1 without bias).
    """
    index, i_h = tl.program_id(0), tl.program_id(1)
    f2, n2 = _first_of_kind(index % kinds[2], N2, TILE[2], BEFORE[2], AFTER[2], DILATION[2])
    index //= kinds[2]
    f1, n1 = _first_of_kind(index % kinds[1], N1, TILE[1], BEFORE[1], AFTER[1], DILATION[1])
    f0, n0 = _first_of_kind(index // kinds[1], N0, TILE[0], BEFORE[0], AFTER[0], DILATION[0])
    first, n = (f0, f1, f2), (n0, n1, n2)
    low, _, _ = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, DISC is not None, INVERSE)
    o_n = tl.arange(0, COLUMNS)
    i, m_i = tile_tokens(first, n, TILE)
    j = box_tokens(o_n, low, BOX)
    m_j = (o_n < BOX[0] * BOX[1] * BOX[2]) & (j[0] < n[0]) & (j[1] < n[1]) & (j[2] < n[2])
    if INVERSE:
        queries, keys = columns(j), rows(i)
    else:
        queries, keys = rows(i), columns(j)
    m_pairs = m_i[:, None] & m_j[None, :]
    m_pairs &= visible(queries, keys, n, AXES, KERNEL, STRIDE, CAUSAL, DISC)
    b_table = tl.zeros(m_pairs.shape, tl.float32)
    if p_bias is not None:
        TABLE: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
        o_b = i_h * TABLE + bias_index(queries, keys, AXES, KERNEL)
        b_table += tl.load(p_bias + o_b, mask=m_pairs, other=0.0).to(tl.float32)
    b_table = tl.where(m_pairs, b_table * LOG2_E, float("-inf"))
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    o_t = (tl.program_id(0) * tl.num_programs(1) + i_h) * (ROWS * COLUMNS)
    tl.store(p_table + o_t + tl.arange(0, ROWS)[:, None] * COLUMNS + o_n[None, :], b_table)


@triton.jit
def _offsets(i, r, s_x, DILATION: tl.constexpr):
    """Return the tokens' offsets in an image of a tensor of strides s_x; 32 bits, half the registers."""
    o_x = (i[0] * DILATION[0] + r[0]) * s_x[1] + (i[1] * DILATION[1] + r[1]) * s_x[2]
    return o_x + (i[2] * DILATION[2] + r[2]) * s_x[3]


@triton.jit
def _place(
    i_h, sizes, kinds,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    INVERSE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    CIRCULAR: tl.constexpr, table_heads,
):  # fmt: skip
    """Return of this program (tile tokens, mask, box tokens, mask, residues, offsets in the tables (rows, COLUMNS))."""
    _, first, r, n = find_tile(sizes, DILATION, TILE)
    low, _, _ = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, CIRCULAR, INVERSE)
    o_n = tl.arange(0, COLUMNS)
    i, m_i = tile_tokens(first, n, TILE)
    j = box_tokens(o_n, low, BOX)
    m_j = (o_n < BOX[0] * BOX[1] * BOX[2]) & (j[0] < n[0]) & (j[1] < n[1]) & (j[2] < n[2])
    kind = _kind(first[0], n[0], sizes[0], TILE[0], BEFORE[0], AFTER[0], DILATION[0]) * kinds[1]
    kind += _kind(first[1], n[1], sizes[1], TILE[1], BEFORE[1], AFTER[1], DILATION[1])
    kind = kind * kinds[2] + _kind(first[2], n[2], sizes[2], TILE[2], BEFORE[2], AFTER[2], DILATION[2])
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    o_t = (kind * table_heads + tl.minimum(i_h, table_heads - 1)) * (ROWS * COLUMNS)
    return i, m_i, j, m_j, r, o_t + tl.arange(0, ROWS)[:, None] * COLUMNS + o_n[None, :]


@triton.jit
def _load(p_x, o_x, m_x, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A (tokens, BLOCK) tile at the tokens' offsets, 0 outside."""
    o_d = tl.arange(0, BLOCK)
    return tl.load(p_x + (o_x[:, None] + o_d[None, :] * stride), mask=m_x[:, None] & (o_d < SIZE)[None, :], other=0.0)


@triton.jit
def _store(p_x, b_x, o_x, m_x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)
    b_x = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + (o_x[:, None] + o_d[None, :]), b_x, mask=m_x[:, None] & (o_d < SIZE)[None, :])


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
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j softmax_j(scale q_i . k_j + bias) v_j` and the log-sum-exp of the scores.

    Grid: (tiles of queries of the maps of all residue classes, heads, groups of `images` images).
    """
    sizes = (N0, N1, N2)
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    i, m_i, j, m_j, r, o_t = _place(
        i_h, sizes, kinds, TILE, BOX, COLUMNS, BEFORE, AFTER, False, KERNEL, STRIDE, DILATION, CAUSAL, CIRCULAR,
        table_heads,
    )  # fmt: skip
    o_q, o_k, o_v = _offsets(i, r, s_q, DILATION), _offsets(j, r, s_k, DILATION), _offsets(j, r, s_v, DILATION)
    o_i = _offsets(i, r, (0, N1 * N2 * heads, N2 * heads, heads), DILATION) + i_h
    p_q += i_h.to(tl.int64) * s_q[4]
    p_k += (i_h // group).to(tl.int64) * s_k[4]
    p_v += (i_h // group).to(tl.int64) * s_v[4]
    # (queries, keys)
    b_table = tl.load(p_table + o_t)
    first_image = tl.program_id(2) * images
    for step in range(tl.minimum(images, batch - first_image)):
        i_b = first_image.to(tl.int64) + step
        # (queries, BK), (keys, BK) and (keys, BV)
        b_q = _load(p_q + i_b * s_q[0], o_q, m_i, s_q[5], DK, BK)
        b_k = _load(p_k + i_b * s_k[0], o_k, m_j, s_k[5], DK, BK)
        b_v = _load(p_v + i_b * s_v[0], o_v, m_j, s_v[5], DV, BV)
        b_s = _dot(b_q, tl.trans(b_k), TYPE, PRECISION) * (scale * LOG2_E) + b_table
        b_p, b_most, b_sum = _softmax(b_s, m_i)
        # A NaN in a key, or an infinity, must stay with the queries that see it, but for others it is NaN - inf here.
        if tl.max(tl.where(b_sum == b_sum, 0, 1), axis=0) > 0:
            b_s = tl.where(b_table == float("-inf"), float("-inf"), b_s)
            b_p, b_most, b_sum = _softmax(b_s, m_i)
        b_out = _dot(b_p, b_v, TYPE, PRECISION) * (1.0 / b_sum)[:, None]
        o_b = i_b * (N0 * N1 * N2 * heads)
        _store(p_out + o_b * DV, b_out, o_i * DV, m_i, DV, BV)
        tl.store(p_lse + o_b + o_i, (b_most + tl.log2(b_sum)) / LOG2_E, mask=m_i)


@triton.jit
def _row_gradients(b_s, b_lse, b_from_value, b_delta):
    """Return the probabilities and the gradients of the scores, from scores times log2(e)."""
    b_p = tl.exp2(b_s - b_lse * LOG2_E)
    return b_p, b_p * (b_from_value - b_delta)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "batch", "images"])
def box_query_gradients_kernel(
    p_q, p_k, p_v, p_table, p_out, p_lse, p_do, p_dlse, p_delta, p_dq, p_dtable,
    scale, N0, N1, N2, kinds, table_heads, batch, images, group, s_q, s_k, s_v, s_o,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq_i = scale sum_j ds_ij k_j`, `delta_i = out_i . grad_out_i - grad_lse_i`, and ds summed over the images.

    The gradient of a score is `ds_ij = p_ij (grad_out_i . v_j - delta_i)`; its sums are (groups, heads, tiles, queries
    of a tile, COLUMNS), float32.
    Grid: (tiles of queries of the maps of all residue classes, heads, groups of `images` images).
    """
    sizes = (N0, N1, N2)
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    i, m_i, j, m_j, r, o_t = _place(
        i_h, sizes, kinds, TILE, BOX, COLUMNS, BEFORE, AFTER, False, KERNEL, STRIDE, DILATION, CAUSAL, CIRCULAR,
        table_heads,
    )  # fmt: skip
    o_q, o_k, o_v = _offsets(i, r, s_q, DILATION), _offsets(j, r, s_k, DILATION), _offsets(j, r, s_v, DILATION)
    o_do = _offsets(i, r, s_o, DILATION)
    o_i = _offsets(i, r, (0, N1 * N2 * heads, N2 * heads, heads), DILATION) + i_h
    p_q += i_h.to(tl.int64) * s_q[4]
    p_k += (i_h // group).to(tl.int64) * s_k[4]
    p_v += (i_h // group).to(tl.int64) * s_v[4]
    p_do += i_h.to(tl.int64) * s_o[4]
    # (queries, keys)
    # Sums of ds and three parts of each operand leave no registers for the table from image to image.
    RELOAD: tl.constexpr = PRECISION == "tf32x3" or p_dtable is not None
    if not RELOAD:
        b_table = tl.load(p_table + o_t)
    b_dtable = tl.zeros(o_t.shape, tl.float32)
    first_image = tl.program_id(2) * images
    for step in range(tl.minimum(images, batch - first_image)):
        i_b = first_image.to(tl.int64) + step
        o_b = i_b * (N0 * N1 * N2 * heads)
        # (queries, BV) and (keys, BV)
        b_do = _load(p_do + i_b * s_o[0], o_do, m_i, s_o[5], DV, BV)
        b_v = _load(p_v + i_b * s_v[0], o_v, m_j, s_v[5], DV, BV)
        b_from_value = _dot(b_do, tl.trans(b_v), TYPE, PRECISION)
        b_out = _load(p_out + o_b * DV, o_i * DV, m_i, 1, DV, BV)
        b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), axis=1)
        b_delta -= tl.load(p_dlse + o_b + o_i, mask=m_i, other=0.0)
        tl.store(p_delta + o_b + o_i, b_delta, mask=m_i)
        b_lse = tl.load(p_lse + o_b + o_i, mask=m_i, other=0.0)
        # (queries, BK) and (keys, BK)
        b_q = _load(p_q + i_b * s_q[0], o_q, m_i, s_q[5], DK, BK)
        b_k = _load(p_k + i_b * s_k[0], o_k, m_j, s_k[5], DK, BK)
        if RELOAD:
            b_table = tl.load(p_table + o_t)
        b_s = _dot(b_q, tl.trans(b_k), TYPE, PRECISION) * (scale * LOG2_E) + b_table
        _, b_ds = _row_gradients(b_s, b_lse[:, None], b_from_value, b_delta[:, None])
        if p_dtable is not None:
            b_dtable += b_ds
        _store(p_dq + o_b * DK, _dot(b_ds, b_k, TYPE, PRECISION) * scale, o_i * DK, m_i, DK, BK)
    if p_dtable is not None:
        ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
        i_p = (tl.program_id(2).to(tl.int64) * heads + i_h) * tl.num_programs(0) + tl.program_id(0)
        o_p = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(p_dtable + i_p * (ROWS * COLUMNS) + o_p, b_dtable)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "groups"])
def box_bias_gradients_kernel(
    p_dtable, p_dbias, N0, N1, N2, groups,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """`dbias[o] = sum_i ds_(i, i + o)` over the queries i of a tile and the groups of images, for BLOCK distances o.

    Writes (heads, tiles, distances).
    Grid: (tiles of queries of the maps of all residue classes, heads, blocks of distances).
    """
    _, first, _, n = find_tile((N0, N1, N2), DILATION, TILE)
    low, _, _ = find_box(first, n, TILE, KERNEL, STRIDE, CAUSAL, CIRCULAR, False)
    i, _ = tile_tokens(first, n, TILE)
    i0, i1, i2 = rows(i)
    W0: tl.constexpr = 2 * KERNEL[0] - 1
    W1: tl.constexpr = 2 * KERNEL[1] - 1
    W2: tl.constexpr = 2 * KERNEL[2] - 1
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    o_o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # Where in its row of the box lies the key at a distance from a query: (queries, BLOCK).
    j0 = i0 + (o_o // (W1 * W2) - (KERNEL[0] - 1))[None, :] - low[0]
    j1 = i1 + (o_o // W2 % W1 - (KERNEL[1] - 1))[None, :] - low[1]
    j2 = i2 + (o_o % W2 - (KERNEL[2] - 1))[None, :] - low[2]
    m_o = (o_o < W0 * W1 * W2)[None, :] & (j0 >= 0) & (j0 < BOX[0]) & (j1 >= 0) & (j1 < BOX[1])
    m_o &= (j2 >= 0) & (j2 < BOX[2])
    o_x = tl.arange(0, ROWS)[:, None] * COLUMNS + (j0 * BOX[1] + j1) * BOX[2] + j2
    i_t = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_dtable += i_t * (ROWS * COLUMNS)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(groups):
        b_sum += tl.load(p_dtable + o_x, mask=m_o, other=0.0)
        p_dtable += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * (ROWS * COLUMNS)
    tl.store(p_dbias + i_t * (W0 * W1 * W2) + o_o, tl.sum(b_sum, axis=0), mask=o_o < W0 * W1 * W2)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "batch", "images"])
def box_key_gradients_kernel(
    p_q, p_k, p_v, p_table, p_lse, p_do, p_delta, p_dk, p_dv,
    scale, N0, N1, N2, kinds, table_heads, batch, images, s_q, s_k, s_v, s_o,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk_j = scale sum_i ds_ij q_i`, `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`.

    Grid: (tiles of keys of the maps of all residue classes, heads, groups of `images` images).
    """
    sizes = (N0, N1, N2)
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    j, m_j, i, m_i, r, o_t = _place(
        i_h, sizes, kinds, TILE, BOX, COLUMNS, BEFORE, AFTER, True, KERNEL, STRIDE, DILATION, CAUSAL, CIRCULAR,
        table_heads,
    )  # fmt: skip
    o_q, o_k, o_v = _offsets(i, r, s_q, DILATION), _offsets(j, r, s_k, DILATION), _offsets(j, r, s_v, DILATION)
    o_do = _offsets(i, r, s_o, DILATION)
    tokens = (0, N1 * N2 * heads, N2 * heads, heads)
    o_i, o_j = _offsets(i, r, tokens, DILATION) + i_h, _offsets(j, r, tokens, DILATION) + i_h
    p_q += i_h.to(tl.int64) * s_q[4]
    p_k += i_h.to(tl.int64) * s_k[4]
    p_v += i_h.to(tl.int64) * s_v[4]
    p_do += i_h.to(tl.int64) * s_o[4]
    # (keys, queries)
    if PRECISION != "tf32x3":
        b_table = tl.load(p_table + o_t)
    first_image = tl.program_id(2) * images
    for step in range(tl.minimum(images, batch - first_image)):
        i_b = first_image.to(tl.int64) + step
        o_b = i_b * (N0 * N1 * N2 * heads)
        # (keys, BK) and (queries, BK)
        b_k = _load(p_k + i_b * s_k[0], o_k, m_j, s_k[5], DK, BK)
        b_q = _load(p_q + i_b * s_q[0], o_q, m_i, s_q[5], DK, BK)
        if PRECISION == "tf32x3":
            # Three parts of each operand leave no registers for it from image to image.
            b_table = tl.load(p_table + o_t)
        b_s = _dot(b_k, tl.trans(b_q), TYPE, PRECISION) * (scale * LOG2_E) + b_table
        # (keys, BV) and (queries, BV)
        b_v = _load(p_v + i_b * s_v[0], o_v, m_j, s_v[5], DV, BV)
        b_do = _load(p_do + i_b * s_o[0], o_do, m_i, s_o[5], DV, BV)
        b_from_value = _dot(b_v, tl.trans(b_do), TYPE, PRECISION)
        b_lse = tl.load(p_lse + o_b + o_i, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + o_b + o_i, mask=m_i, other=0.0)
        b_p, b_ds = _row_gradients(b_s, b_lse[None, :], b_from_value, b_delta[None, :])
        _store(p_dv + o_b * DV, _dot(b_p, b_do, TYPE, PRECISION), o_j * DV, m_j, DV, BV)
        _store(p_dk + o_b * DK, _dot(b_ds, b_q, TYPE, PRECISION) * scale, o_j * DK, m_j, DK, BK)
