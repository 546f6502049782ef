"""Where a tile's tokens and windows lie on the map: what all Triton kernels of neighborhood attention share.

Positions are tuples of three, one an axis: token numbers inside a residue class, as vectors or as rows and columns of a
tile of scores; `n` holds the lengths of the class. A function that takes an AXIS works along this one.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Window(NamedTuple):
    """The window, a constant of every kernel; an axis that the map lacks has 1 token and a kernel of 1.

    Attributes:
        AXES: The map's axes, the last ones of three.
        KERNEL: The kernel size along each axis.
        STRIDE: The stride along each axis.
        DILATION: The dilation along each axis.
        CAUSAL: Whether each axis is causal.
        DISC: A circular window's weights of squared offsets, their limit and whether sums need 64 bits; else None.
        TABLE: Entries of a head's table of position biases.
    """

    AXES: int
    KERNEL: tuple[int, int, int]
    STRIDE: tuple[int, int, int]
    DILATION: tuple[int, int, int]
    CAUSAL: tuple[bool, bool, bool]
    DISC: tuple[int, int, int, int, bool] | None
    TABLE: int


class Channels(NamedTuple):
    """A head's channels and the products of them, a constant of every kernel.

    Attributes:
        DK: Channels of a query and a key.
        DV: Channels of a value.
        BK: DK, padded to a power of two.
        BV: DV, padded to a power of two.
        TYPE: The type of the operands; sums are float32.
        PRECISION: The precision of products of float32 operands.
    """

    DK: int
    DV: int
    BK: int
    BV: int
    TYPE: tl.dtype
    PRECISION: str


class Strides(NamedTuple):
    """The strides of a (batch, three axes, heads, dim) tensor."""

    batch: int
    axes: tuple[int, int, int]
    head: int
    dim: int


def map_strides(x: Tensor) -> Strides:
    """Return the strides of a (batch, *grid, heads, dim) tensor, 0 for axes that a map of fewer than three lacks."""
    batch, *axes, head, dim = x.stride()
    return Strides(batch, (*[0] * (3 - len(axes)), *axes), head, dim)


@triton.jit
def split_axis(index, size, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Take an axis' tile and residue class off a program's number: (the rest, first token, residue, class length)."""
    classes = tl.minimum(size, DILATION)
    tiles = tl.cdiv(tl.cdiv(size, classes), TILE)
    residue = index // tiles % classes
    return index // (tiles * classes), index % tiles * TILE, residue, (size - residue + DILATION - 1) // DILATION


@triton.jit
def find_tile(sizes, window: tl.constexpr, tile: tl.constexpr):
    """Return (batch and head, first tokens, residues, class lengths) of this program's tile of `tile.TILE` tokens."""
    index, f2, r2, n2 = split_axis(tl.program_id(0), sizes[2], window.DILATION[2], tile.TILE[2])
    index, f1, r1, n1 = split_axis(index, sizes[1], window.DILATION[1], tile.TILE[1])
    index, f0, r0, n0 = split_axis(index, sizes[0], window.DILATION[0], tile.TILE[0])
    return index, (f0, f1, f2), (r0, r1, r2), (n0, n1, n2)


@triton.jit
def tile_tokens(first, n, tile: tl.constexpr):
    """Return a tile's tokens and which of them the class has."""
    ROWS: tl.constexpr = tile.TILE[0] * tile.TILE[1] * tile.TILE[2]
    o_m = tl.arange(0, ROWS)
    i0 = first[0] + o_m // (tile.TILE[1] * tile.TILE[2])
    i1 = first[1] + o_m // tile.TILE[2] % tile.TILE[1]
    i2 = first[2] + o_m % tile.TILE[2]
    return (i0, i1, i2), (i0 < n[0]) & (i1 < n[1]) & (i2 < n[2])


@triton.jit
def box_tokens(o_n, low, width):
    """Return tokens number `o_n` of a box."""
    i0 = low[0] + o_n // (width[1] * width[2])
    i1 = low[1] + o_n // width[2] % width[1]
    i2 = low[2] + o_n % width[2]
    return i0, i1, i2


@triton.jit
def offsets(i, r, strides, window: tl.constexpr, TYPE: tl.constexpr = tl.int64):
    """Return the tokens' offsets in an image, from the strides of its axes."""
    o_x = (i[0] * window.DILATION[0] + r[0]).to(TYPE) * strides[0]
    o_x += (i[1] * window.DILATION[1] + r[1]).to(TYPE) * strides[1]
    return o_x + (i[2] * window.DILATION[2] + r[2]).to(TYPE) * strides[2]


@triton.jit
def first_key(i, n, window: tl.constexpr, AXIS: tl.constexpr):
    """The first key that the queries `i` see along an axis of n tokens; `windows.axis_window` has the rules."""
    KERNEL: tl.constexpr = window.KERNEL[AXIS]
    STRIDE: tl.constexpr = window.STRIDE[AXIS]
    if window.DISC is not None:
        start = i - KERNEL // 2
    elif window.CAUSAL[AXIS]:
        start = tl.minimum(i // STRIDE * STRIDE + STRIDE - 1, n - 1) - KERNEL + 1
    else:
        start = tl.minimum(tl.minimum(i // STRIDE * STRIDE + STRIDE // 2, n - 1) - KERNEL // 2, n - KERNEL)
    return tl.maximum(start, 0)


@triton.jit
def key_stop(i, n, window: tl.constexpr, AXIS: tl.constexpr):
    """One past the last key that the queries `i` see along an axis of n tokens."""
    if window.CAUSAL[AXIS]:
        stop = i + 1
    elif window.DISC is not None:
        stop = i + window.KERNEL[AXIS] // 2 + 1
    else:
        stop = first_key(i, n, window, AXIS) + window.KERNEL[AXIS]
    return tl.minimum(stop, n)


@triton.jit
def _keys(first, n, window: tl.constexpr, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Return along an axis the union of the windows of a tile's queries: (first key, keys)."""
    # Starts and stops never fall from one query to the next.
    low = first_key(first, n, window, AXIS)
    high = key_stop(tl.minimum(first + TILE, n) - 1, n, window, AXIS)
    # A tile may lie past the end of a shorter class.
    return low, tl.where(first < n, high - low, 0)


@triton.jit
def _queries(first, n, window: tl.constexpr, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Return along an axis the queries that may see a tile's keys: (first query, queries)."""
    KERNEL: tl.constexpr = window.KERNEL[AXIS]
    STRIDE: tl.constexpr = window.STRIDE[AXIS]
    CAUSAL: tl.constexpr = window.CAUSAL[AXIS]
    last = tl.minimum(first + TILE, n) - 1
    if window.DISC is not None:
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
def find_box(first, n, window: tl.constexpr, tile: tl.constexpr, INVERSE: tl.constexpr):
    """Return the box of the keys that a tile of queries sees, INVERSE of the queries that see a tile of keys.

    (first tokens, widths, tokens in all.)
    """
    if INVERSE:
        l0, w0 = _queries(first[0], n[0], window, 0, tile.TILE[0])
        l1, w1 = _queries(first[1], n[1], window, 1, tile.TILE[1])
        l2, w2 = _queries(first[2], n[2], window, 2, tile.TILE[2])
    else:
        l0, w0 = _keys(first[0], n[0], window, 0, tile.TILE[0])
        l1, w1 = _keys(first[1], n[1], window, 1, tile.TILE[1])
        l2, w2 = _keys(first[2], n[2], window, 2, tile.TILE[2])
    return (l0, l1, l2), (w0, w1, w2), w0 * w1 * w2


@triton.jit
def rows(i):
    return i[0][:, None], i[1][:, None], i[2][:, None]


@triton.jit
def columns(i):
    return i[0][None, :], i[1][None, :], i[2][None, :]


@triton.jit
def _sees(i, j, n, window: tl.constexpr, AXIS: tl.constexpr):
    i, j, n = i[AXIS], j[AXIS], n[AXIS]
    return (j >= first_key(i, n, window, AXIS)) & (j < key_stop(i, n, window, AXIS))


@triton.jit
def _distance(i, j, window: tl.constexpr, AXIS: tl.constexpr):
    offset = j[AXIS] - i[AXIS]
    if window.DISC[4]:
        offset = offset.to(tl.int64)
    return offset * offset * window.DISC[AXIS]


@triton.jit
def visible(i, j, n, window: tl.constexpr):
    """Whether the queries `i` see the keys `j`."""
    mask = _sees(i, j, n, window, 2)
    if window.AXES > 1:
        mask &= _sees(i, j, n, window, 1)
    if window.AXES > 2:
        mask &= _sees(i, j, n, window, 0)
    if window.DISC is not None:
        distance = _distance(i, j, window, 2)
        if window.AXES > 1:
            distance += _distance(i, j, window, 1)
        if window.AXES > 2:
            distance += _distance(i, j, window, 0)
        mask &= distance < window.DISC[3]
    return mask


@triton.jit
def bias_index(i, j, window: tl.constexpr):
    """The places in the flattened table of position biases."""
    KERNEL: tl.constexpr = window.KERNEL
    index = j[2] - i[2] + (KERNEL[2] - 1)
    if window.AXES > 1:
        index += (j[1] - i[1] + (KERNEL[1] - 1)) * (2 * KERNEL[2] - 1)
    if window.AXES > 2:
        index += (j[0] - i[0] + (KERNEL[0] - 1)) * ((2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    return index


@triton.jit
def load_channels(p_x, o_x, m_x, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A (tokens, BLOCK) tile at the tokens' offsets, 0 outside."""
    o_d = tl.arange(0, BLOCK)
    return tl.load(p_x + (o_x[:, None] + o_d[None, :] * stride), mask=m_x[:, None] & (o_d < SIZE)[None, :], other=0.0)


@triton.jit
def store_channels(p_x, b_x, o_x, m_x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a (tokens, BLOCK) tile at the tokens' offsets."""
    o_d = tl.arange(0, BLOCK)
    b_x = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + (o_x[:, None] + o_d[None, :]), b_x, mask=m_x[:, None] & (o_d < SIZE)[None, :])
