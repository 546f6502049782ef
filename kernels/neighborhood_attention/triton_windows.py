"""Where a tile's tokens and windows lie on the map: what all Triton kernels of neighborhood attention share.

Positions are tuples of three, one an axis: token numbers inside a residue class, as vectors or as rows and columns of a
tile of scores; `n` holds the lengths of the class. Strides are tuples as PyTorch gives them, of maps with three axes:
(batch, three axes, heads, dim).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_axis(index, size, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Take an axis' tile and residue class off a program's number: (the rest, first token, residue, class length)."""
    classes = tl.minimum(size, DILATION)
    tiles = tl.cdiv(tl.cdiv(size, classes), TILE)
    residue = index // tiles % classes
    return index // (tiles * classes), index % tiles * TILE, residue, (size - residue + DILATION - 1) // DILATION


@triton.jit
def find_tile(sizes, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Return (batch and head, first tokens, residues, class lengths) of this program's tile."""
    index, f2, r2, n2 = split_axis(tl.program_id(0), sizes[2], DILATION[2], TILE[2])
    index, f1, r1, n1 = split_axis(index, sizes[1], DILATION[1], TILE[1])
    index, f0, r0, n0 = split_axis(index, sizes[0], DILATION[0], TILE[0])
    return index, (f0, f1, f2), (r0, r1, r2), (n0, n1, n2)


@triton.jit
def tile_tokens(first, n, TILE: tl.constexpr):
    """Return a tile's tokens and which of them the class has."""
    ROWS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    o_m = tl.arange(0, ROWS)
    i0 = first[0] + o_m // (TILE[1] * TILE[2])
    i1 = first[1] + o_m // TILE[2] % TILE[1]
    i2 = first[2] + o_m % TILE[2]
    return (i0, i1, i2), (i0 < n[0]) & (i1 < n[1]) & (i2 < n[2])


@triton.jit
def box_tokens(o_n, low, width):
    """Return tokens number `o_n` of a box."""
    i0 = low[0] + o_n // (width[1] * width[2])
    i1 = low[1] + o_n // width[2] % width[1]
    i2 = low[2] + o_n % width[2]
    return i0, i1, i2


@triton.jit
def offsets(i, r, s_x, DILATION: tl.constexpr):
    """Return the tokens' offsets in an image of a tensor of strides s_x."""
    o_x = (i[0] * DILATION[0] + r[0]).to(tl.int64) * s_x[1]
    o_x += (i[1] * DILATION[1] + r[1]).to(tl.int64) * s_x[2]
    return o_x + (i[2] * DILATION[2] + r[2]).to(tl.int64) * s_x[3]


@triton.jit
def token_numbers(i, r, sizes, DILATION: tl.constexpr):
    """Return the tokens' numbers in an image of `sizes`, row by row."""
    return offsets(i, r, (0, sizes[1] * sizes[2], sizes[2], 1), DILATION)


@triton.jit
def first_key(i, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    """The first key that the queries `i` see along an axis; `windows.axis_window` has the rules."""
    if CIRCULAR:
        start = i - KERNEL // 2
    elif CAUSAL:
        start = tl.minimum(i // STRIDE * STRIDE + STRIDE - 1, n - 1) - KERNEL + 1
    else:
        start = tl.minimum(tl.minimum(i // STRIDE * STRIDE + STRIDE // 2, n - 1) - KERNEL // 2, n - KERNEL)
    return tl.maximum(start, 0)


@triton.jit
def key_stop(i, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    """One past the last key that the queries `i` see along an axis."""
    if CAUSAL:
        stop = i + 1
    elif CIRCULAR:
        stop = i + KERNEL // 2 + 1
    else:
        stop = first_key(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR) + KERNEL
    return tl.minimum(stop, n)


@triton.jit
def _keys(
    first, n, TILE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """Return along an axis the union of the windows of a tile's queries: (first key, keys)."""
    # Starts and stops never fall from one query to the next.
    low = first_key(first, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)
    high = key_stop(tl.minimum(first + TILE, n) - 1, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)
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
def find_box(
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
def rows(i):
    return i[0][:, None], i[1][:, None], i[2][:, None]


@triton.jit
def columns(i):
    return i[0][None, :], i[1][None, :], i[2][None, :]


@triton.jit
def _sees(i, j, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr):
    return (j >= first_key(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)) & (
        j < key_stop(i, n, KERNEL, STRIDE, CAUSAL, CIRCULAR)
    )


@triton.jit
def _distance(i, j, WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    offset = (j - i).to(tl.int64) if WIDE else j - i
    return offset * offset * WEIGHT


@triton.jit
def visible(
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
def bias_index(i, j, AXES: tl.constexpr, KERNEL: tl.constexpr):
    """The places in the flattened table of position biases."""
    index = j[2] - i[2] + (KERNEL[2] - 1)
    if AXES > 1:
        index += (j[1] - i[1] + (KERNEL[1] - 1)) * (2 * KERNEL[2] - 1)
    if AXES > 2:
        index += (j[0] - i[0] + (KERNEL[0] - 1)) * ((2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    return index
