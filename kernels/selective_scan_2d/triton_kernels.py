"""The Triton kernels of the selective scan of a map; `triton.py` launches them and says how they work together.

A program of one warp has chunks of STEPS steps and BC channels: lanes lie along the channels, and a thread has all
steps of its channels, so that a recurrence needs no exchange. Maps have one axis of cells.

Values are named b_, pointers p_, offsets o_, masks m_, indices i_, strides s.<tensor>[axis]; `at` is a chunk's place.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from visionmix.kernels.gpu import interpreting
from visionmix.kernels.selective_scan.triton_kernels import LOG2_E, combine, softplus
from visionmix.kernels.selective_scan_2d.chunks import CHUNK

INTERPRETED = tl.constexpr(interpreting())

STEPS = tl.constexpr(CHUNK)

# Ranks of a low-rank delta that are multiplied out at a time.
RANKS = tl.constexpr(16)


class Sizes(NamedTuple):
    """Sizes of a problem. `orders` have parameters of their own, `routes` maps of their own.

    `slots` is what lies between the slots of two images, where each has its own.
    """

    batch: int
    steps: int
    chunks: int
    cells: int
    channels: int
    orders: int
    routes: int
    slots: int


class Strides(NamedTuple):
    """Strides of the inputs.

    Those of x are (batch, cells, channels, routes), of delta, B and C (batch, cells, K, features), and of A (K,
    channels, N).
    """

    x: tuple[int, ...]
    delta: tuple[int, ...]
    B: tuple[int, ...]
    C: tuple[int, ...]
    A: tuple[int, ...]


class Constants(NamedTuple):
    """Constants of a problem.

    DIRECTIONS is 2 where a sequence of slots serves an order and its reverse. With JOINED, slots are route x cells +
    cell. OWN says whether each image has its own slots, PADDED whether a slot may be -1, TAIL whether the last chunk
    has fewer than STEPS steps, INT64 whether offsets in an image pass int32. Products with the weights of a low rank
    take their operands as they are stored, or in float32 if WIDENED.
    """

    DIRECTIONS: int
    N: int
    RANK: int
    BC: int
    SOFTPLUS: bool
    JOINED: bool
    OWN: bool
    PADDED: bool
    TAIL: bool
    INT64: bool
    WIDENED: bool
    PRECISION: str


@triton.jit
def _first(b_x, b_y):
    return b_x


@triton.jit
def _lanes_last(b_x):
    """The same tile with registers along the first axis and lanes along the last.

    A product leaves its result in another layout, in which Triton would go on until the recurrences. It takes no layout
    through a scan, of one element here.
    """
    if not INTERPRETED:
        b_x = tl.reshape(tl.associative_scan(b_x[:, :, None], 2, _first), b_x.shape)
    return b_x


@triton.jit
def _over_channels(b_x):
    """The sums over the channels of a (steps, channels) tile: in registers, of the transposed tile."""
    return tl.sum(_lanes_last(tl.trans(b_x)), axis=0)


@triton.jit
def _combine_and_before(a, b, a_before, b_before, a_next, b_next, a_next_before, b_next_before):
    """`combine`, and what it makes without the last step."""
    return a * a_next, a_next * b + b_next, a * a_next_before, a_next_before * b + b_next_before


@triton.jit
def _flip(b_x, BACK: tl.constexpr):
    """The tile from the last step to the first if BACK.

    It renames registers, where `associative_scan(reverse=True)` exchanges every value with all lanes.
    """
    return tl.flip(b_x, 0) if BACK else b_x


@triton.jit
def _scan(b_a, b_in, b_h, BACK: tl.constexpr):
    """`h_t = a_t h_(t-1) + in_t` along the steps, or h_(t+1) if BACK; `h` (channels,) enters."""
    b_a, b_in = _flip(b_a, BACK), _flip(b_in, BACK)
    b_in = tl.where(tl.arange(0, STEPS)[:, None] == 0, b_a * b_h[None, :] + b_in, b_in)
    _, b_s = tl.associative_scan((b_a, b_in), 0, combine)
    return _flip(b_s, BACK)


@triton.jit
def _state_gradients(b_a, b_direct, b_flow, BACK: tl.constexpr):
    """The gradients of the states, `dh_t = direct_t + g_(t+1)` with `g_t = a_t dh_t`, or g_(t-1) unless BACK.

    `flow` (channels,) is the g that enters. The scan makes g, and g without its last step, so that nothing is shifted.
    """
    b_a, b_direct = _flip(b_a, BACK), _flip(b_direct, BACK)
    m_first = tl.arange(0, STEPS)[:, None] == 0
    b_before = tl.where(m_first, b_flow[None, :], 0.0)
    b_g = b_a * (b_direct + b_before)
    b_one = tl.full(b_a.shape, 1.0, tl.float32)
    _, _, _, b_before = tl.associative_scan((b_a, b_g, b_one, b_before), 0, _combine_and_before)
    return _flip(b_direct + b_before, BACK)


@triton.jit
def _row(b_x, i: tl.constexpr):
    """Row i of a (steps, channels) tile."""
    return tl.sum(tl.where((tl.arange(0, STEPS) == i)[:, None], b_x, 0.0), axis=0)


@triton.jit
def _order(p_orders, K: tl.constexpr):
    """The number of an order."""
    i_k = tl.load(p_orders)
    return i_k.to(tl.int64) if K.INT64 else i_k


@triton.jit
def _channels(size, K: tl.constexpr):
    """The program's channels, and which of them there are."""
    # The hint keeps a thread from loading channels that lie side by side: its steps would go to other threads.
    o_c = tl.max_contiguous(tl.program_id(1) * K.BC + tl.arange(0, K.BC), 1)
    return o_c.to(tl.int64) if K.INT64 else o_c, o_c < size.channels


@triton.jit
def _image(p_slots, i_b, size, K: tl.constexpr):
    """An image's slots of the program's sequence, or the gaps before them."""
    p_slots += tl.program_id(2) * size.steps
    if K.OWN:
        p_slots += i_b * size.slots
    return p_slots


@triton.jit
def _cells(p_slots, i_t, i_k, size, K: tl.constexpr):
    """A chunk's cells, 0 in a padded step, their routes, which steps there are, and which of them read a cell.

    Steps beyond the last repeat it.
    """
    o_t = i_t * STEPS + tl.arange(0, STEPS)
    m_t = o_t < size.steps
    o_cell = tl.load(p_slots + (tl.minimum(o_t, size.steps - 1) if K.TAIL else o_t))
    m_cell = o_cell >= 0
    if K.PADDED:
        o_cell = tl.where(m_cell, o_cell, 0)
    b_route = i_k
    if K.JOINED:
        b_route = (o_cell // size.cells).to(tl.int64)
        o_cell = o_cell % size.cells
    return o_cell.to(tl.int64) if K.INT64 else o_cell, b_route, m_t, m_cell


@triton.jit
def _place(p_slots, i_b, i_t, i_k, size, K: tl.constexpr):
    """A chunk's image, cells and channels, as the functions below take them."""
    o_c, m_c = _channels(size, K)
    o_cell, b_route, m_t, m_cell = _cells(p_slots, i_t, i_k, size, K)
    return i_b, o_cell, b_route, o_c, m_t, m_cell, m_c


@triton.jit
def _steps_there(at, K: tl.constexpr):
    """Which steps of the chunk read a cell and are none beyond the last (steps, 1)."""
    _, _, _, _, m_t, m_cell, _ = at
    if K.PADDED:
        m_t = m_t & m_cell
    return m_t[:, None]


@triton.jit
def _pointers(p_x, at, s, K: tl.constexpr):
    """Pointers to a tile of a map with strides s (batch, cells, channels, routes)."""
    i_b, o_cell, b_route, o_c, _, _, _ = at
    p_x += i_b * s[0]
    if K.JOINED:
        o_cell = o_cell * s[1] + b_route * s[3]
    else:
        p_x += b_route * s[3]
        o_cell *= s[1]
    return (p_x + o_c * s[2])[None, :] + o_cell[:, None]


@triton.jit
def _tile(p_x, at, s, K: tl.constexpr):
    """A (steps, channels) tile of a map in float32, 0 in a padded step."""
    _, _, _, _, _, m_cell, m_c = at
    mask = m_cell[:, None] & m_c[None, :] if K.PADDED else m_c[None, :]
    return tl.load(_pointers(p_x, at, s, K), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(p_out, p_add, b_x, at, s, K: tl.constexpr):
    """Store a tile of a map; `add`, the map of other orders, is added where there is one."""
    _, _, _, _, _, _, m_c = at
    mask = _steps_there(at, K) & m_c[None, :] if K.PADDED or K.TAIL else m_c[None, :]
    if p_add is not None:
        b_x += tl.load(_pointers(p_add, at, s, K), mask=mask, other=0.0)
    tl.store(_pointers(p_out, at, s, K), b_x.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _projection(p_x, i_k, n, at, s, K: tl.constexpr):
    """One state's B or C (steps, 1), 0 in a padded step and beyond the last step.

    So a step beyond the last adds nothing to a state, or to its gradient, whatever else is read there.
    """
    i_b, o_cell, _, _, _, _, _ = at
    p_x = (p_x + i_b * s[0] + i_k * s[2] + n * s[3] + o_cell * s[1])[:, None]
    b_x = tl.load(p_x, mask=_steps_there(at, K), other=0.0) if K.PADDED or K.TAIL else tl.load(p_x)
    return b_x.to(tl.float32)


@triton.jit
def _vector(p_x, i_k, at, size):
    """A parameter (K, channels) of an order, 0 where there is none."""
    _, _, _, o_c, _, _, m_c = at
    if p_x is None:
        b_x = tl.zeros(o_c.shape, tl.float32)
    else:
        b_x = tl.load(p_x + i_k * size.channels + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _rates(p_A, i_k, n, at, s):
    """A state's A (channels,)."""
    _, _, _, o_c, _, _, m_c = at
    return tl.load(p_A + i_k * s[0] + o_c * s[1] + n * s[2], mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _low_rank(p_delta, i_k, o_r, at, s, K: tl.constexpr):
    """A (steps, RANKS) tile of a low-rank delta, 0 in a padded step."""
    i_b, o_cell, _, _, _, m_cell, _ = at
    mask = (o_r < K.RANK)[None, :] & m_cell[:, None] if K.PADDED else (o_r < K.RANK)[None, :]
    p_r = (p_delta + i_b * s[0] + i_k * s[2] + o_cell * s[1])[:, None] + (o_r * s[3])[None, :]
    b_r = tl.load(p_r, mask=mask, other=0.0)
    return b_r.to(tl.float32) if K.WIDENED or INTERPRETED else b_r


@triton.jit
def _weights(p_weight, i_k, o_r, at, size, K: tl.constexpr):
    """A (channels, RANKS) tile of the weights, whose rows are filled up with zeros to a multiple of RANKS."""
    _, _, _, o_c, _, _, m_c = at
    p_w = p_weight + (i_k * size.channels + o_c)[:, None] * (tl.cdiv(K.RANK, RANKS) * RANKS) + o_r[None, :]
    b_w = tl.load(p_w, mask=m_c[:, None], other=0.0)
    return b_w.to(tl.float32) if K.WIDENED or INTERPRETED else b_w


@triton.jit
def _delta(p_delta, p_weight, p_bias, i_k, at, s, size, K: tl.constexpr):
    """The step sizes (steps, channels) of an order."""
    i_b, o_cell, _, o_c, m_t, m_cell, m_c = at
    if K.RANK > 0:
        b_raw = tl.zeros((STEPS, K.BC), tl.float32)
        for r in tl.static_range(0, K.RANK, RANKS):
            o_r = r + tl.arange(0, RANKS)
            b_w = tl.trans(_weights(p_weight, i_k, o_r, at, size, K))
            b_raw = tl.dot(_low_rank(p_delta, i_k, o_r, at, s.delta, K), b_w, b_raw, input_precision=K.PRECISION)
        b_raw = _lanes_last(b_raw)
    else:
        b_raw = _tile(p_delta, (i_b, o_cell, i_k, o_c, m_t, m_cell, m_c), _as_map(s.delta), K)
    if p_bias is not None:
        b_raw += _vector(p_bias, i_k, at, size)[None, :]
    return softplus(b_raw) if K.SOFTPLUS else b_raw


@triton.jit
def _gaps(p_gaps, i_b, i_t, size, K: tl.constexpr):
    """How many places of zeros each step of a chunk crosses first (steps, 1); there are gaps."""
    o_t = i_t * STEPS + tl.arange(0, STEPS)
    return tl.load(_image(p_gaps, i_b, size, K) + o_t, mask=o_t < size.steps, other=0).to(tl.float32)[:, None]


@triton.jit
def _zero_step(p_bias, i_k, at, size, K: tl.constexpr):
    """The step size of a place of zeros (1, channels)."""
    b_step = _vector(p_bias, i_k, at, size)[None, :]
    return softplus(b_step) if K.SOFTPLUS else b_step


@triton.jit
def _decaying(b_delta, p_gaps, p_bias, i_t, i_k, at, size, K: tl.constexpr):
    """The steps that states decay by: with gaps, longer than those that inputs come with."""
    if p_gaps is not None:
        b_delta += _gaps(p_gaps, at[0], i_t, size, K) * _zero_step(p_bias, i_k, at, size, K)
    return b_delta


@triton.jit
def _as_map(s):
    """The strides of a map by order, (batch, cells, K, channels), as `_pointers` takes them."""
    return s[0], s[1], s[3], s[2]


@triton.jit
def ends_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_bias, p_slots, p_gaps, p_orders, p_end, p_sum, scale, s, size,
    K: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The states that the chunks make of a state of 0, `end`, and the sums of their steps, `sum`.

    BACKWARD, x being the output's gradient, which is multiplied by `scale`, and B being C: what the chunks hand on, to
    those before them, of `g_t = exp(delta_t A) (C_t dy_t + g_(t+1))`.

    end (batch, K, chunks, N, channels), sum (batch, K, chunks, channels).
    Grid: (batch x chunks, tiles of channels, sequences of slots).
    """
    i_b, i_t = (tl.program_id(0) // size.chunks).to(tl.int64), tl.program_id(0) % size.chunks
    p_orders += tl.program_id(2) * K.DIRECTIONS
    at = _place(_image(p_slots, i_b, size, K), i_b, i_t, _order(p_orders, K), size, K)
    _, _, _, o_c, m_t, _, m_c = at
    b_x = _tile(p_x, at, s.x, K)
    if scale is not None:
        b_x *= scale
    for d in tl.static_range(K.DIRECTIONS):
        i_k = _order(p_orders + d, K)
        b_delta = _delta(p_delta, p_weight, p_bias, i_k, at, s, size, K)
        b_whole = _decaying(b_delta, p_gaps, p_bias, i_t, i_k, at, size, K)
        o_end = (i_b * size.orders + i_k) * size.chunks + i_t
        for n in range(K.N):
            b_a = tl.exp2(b_whole * (_rates(p_A, i_k, n, at, s.A) * LOG2_E)[None, :])
            b_in = (b_a if BACKWARD else b_delta) * b_x * _projection(p_B, i_k, n, at, s.B, K)
            b_s = _scan(b_a, b_in, tl.zeros((K.BC,), tl.float32), (d == 1) != BACKWARD)
            b_end = _row(b_s, 0 if (d == 1) != BACKWARD else STEPS - 1)
            tl.store(p_end + (o_end * K.N + n) * size.channels + o_c, b_end, mask=m_c)
        if K.TAIL:
            b_whole = tl.where(m_t[:, None], b_whole, 0.0)
        tl.store(p_sum + o_end * size.channels + o_c, tl.sum(b_whole, axis=0), mask=m_c)


@triton.jit
def carries_kernel(p_A, p_end, p_sum, p_orders, p_enter, s_A, size, K: tl.constexpr, BACKWARD: tl.constexpr):
    """What enters the chunks, `enter`, from what `ends_kernel` found: both (batch, K, chunks, N, channels).

    Grid: (batch, tiles of channels, K).
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_k = _order(p_orders + tl.program_id(2), K)
    BACK = (tl.program_id(2) % K.DIRECTIONS == 1) != BACKWARD
    o_c, m_c = _channels(size, K)
    o_map = (i_b * size.orders + i_k) * size.chunks
    ahead = tl.where(BACK, -1, 1)
    first = tl.where(BACK, size.chunks - 1, 0)
    for n in range(K.N):
        b_A = tl.load(p_A + i_k * s_A[0] + o_c * s_A[1] + n * s_A[2], mask=m_c, other=0.0).to(tl.float32) * LOG2_E
        b_h = tl.zeros((K.BC,), tl.float32)
        tl.store(p_enter + ((o_map + first) * K.N + n) * size.channels + o_c, b_h, mask=m_c)
        for i in range(0, size.chunks, STEPS):
            o_i = i + tl.arange(0, STEPS)
            o_chunk = o_map + first + ahead * o_i
            mask = (o_i < size.chunks)[:, None] & m_c[None, :]
            b_sum = tl.load((p_sum + o_chunk * size.channels)[:, None] + o_c[None, :], mask=mask, other=0.0)
            p_h = (p_end + (o_chunk * K.N + n) * size.channels)[:, None] + o_c[None, :]
            b_s = _scan(tl.exp2(b_sum * b_A[None, :]), tl.load(p_h, mask=mask, other=0.0), b_h, False)
            p_h = (p_enter + ((o_chunk + ahead) * K.N + n) * size.channels)[:, None] + o_c[None, :]
            tl.store(p_h, b_s, mask=mask & (o_i + 1 < size.chunks)[:, None])
            b_h = _row(b_s, STEPS - 1)


@triton.jit
def outputs_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_gaps, p_orders, p_enter, p_add, p_out, scale,
    s, s_out, size, K: tl.constexpr,
):  # fmt: skip
    """`h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_o(t)`, `y_o(t) = C_t h_t + D x_o(t)`, from what enters a chunk.

    delta, B and C at step t are those of the cell o(t); with gaps, delta_t in the decay has those of the places before
    it too. The two directions of a sequence of slots are summed,
    multiplied by `scale` and added to `add`, the map of other orders, where these are given.
    Grid: (batch x chunks, tiles of channels, sequences of slots).
    """
    i_b, i_t = (tl.program_id(0) // size.chunks).to(tl.int64), tl.program_id(0) % size.chunks
    p_orders += tl.program_id(2) * K.DIRECTIONS
    at = _place(_image(p_slots, i_b, size, K), i_b, i_t, _order(p_orders, K), size, K)
    _, _, _, o_c, _, _, m_c = at
    b_x = _tile(p_x, at, s.x, K)
    b_y = tl.zeros((STEPS, K.BC), tl.float32)
    b_D = tl.zeros((K.BC,), tl.float32)
    for d in tl.static_range(K.DIRECTIONS):
        i_k = _order(p_orders + d, K)
        b_delta = _delta(p_delta, p_weight, p_bias, i_k, at, s, size, K)
        b_whole = _decaying(b_delta, p_gaps, p_bias, i_t, i_k, at, size, K)
        o_enter = (i_b * size.orders + i_k) * size.chunks + i_t
        for n in tl.range(K.N, disable_licm=True):
            here = at
            if K.N > 1:
                # Cells are read anew: registers do not hold the addresses made of them.
                tl.debug_barrier()
                here = _place(_image(p_slots, i_b, size, K), i_b, i_t, i_k, size, K)
            b_a = tl.exp2(b_whole * (_rates(p_A, i_k, n, here, s.A) * LOG2_E)[None, :])
            b_in = b_delta * (b_x * _projection(p_B, i_k, n, here, s.B, K))
            b_h = tl.load(p_enter + (o_enter * K.N + n) * size.channels + o_c, mask=m_c, other=0.0)
            b_y += _scan(b_a, b_in, b_h, d == 1) * _projection(p_C, i_k, n, here, s.C, K)
        b_D += _vector(p_D, i_k, at, size)
    if p_D is not None:
        b_y += b_x * b_D[None, :]
    if scale is not None:
        b_y *= scale
    _store_tile(p_out, p_add, b_y, at, s_out, K)


@triton.jit
def _add_to(p_sum, b_x, mask):
    """Add to what this program alone sums."""
    tl.store(p_sum, tl.load(p_sum, mask=mask, other=0.0) + b_x, mask=mask)


@triton.jit
def _softplus_gradient(b_y):
    """The derivative of y = softplus(x): 1 - exp(-y), its series where the difference would cancel.

    It is found from y, since registers do not hold x beside it.
    """
    b_series = 1.0 - b_y * (1 / 4) * (1.0 - b_y * (1 / 5) * (1.0 - b_y * (1 / 6)))
    b_series = b_y * (1.0 - b_y * (1 / 2) * (1.0 - b_y * (1 / 3) * b_series))
    return tl.where(b_y < 0.25, b_series, 1.0 - tl.exp2(-b_y * LOG2_E))


@triton.jit
def _by_route(i_k, at, routes, K: tl.constexpr):
    """The positions (steps,) of an order's cells in an image's map (cells, routes), and which of them there are."""
    _, o_cell, b_route, _, _, _, _ = at
    o_map = o_cell * routes + (b_route if K.JOINED else i_k).to(o_cell.dtype)
    return o_map, tl.reshape(_steps_there(at, K), (STEPS,))


@triton.jit
def gradients_kernel(
    p_x, p_delta, p_weight, p_A, p_B, p_C, p_D, p_bias, p_slots, p_gaps, p_orders, p_enter, p_flow, p_grad,
    p_add, p_dx, p_ddelta, p_dweight, p_dA, p_dB, p_dC, p_dD, p_dbias, scale, s, s_grad, s_out, size, span,
    K: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The gradients of one direction, the second if BACK, as `selective_scan`'s `backward_kernel` has them.

    From the states that enter the chunks, and from what flows into them from behind, at the cells that the steps read.
    A program has `span` chunks of all images', one after the other. grad_out is multiplied by `scale`, where given.

    `dx` is stored as `outputs_kernel` stores `out`. By route: ddelta (batch, cells, routes, channels), or of low rank
    (tiles, batch, cells, routes, RANK) to be summed over the tiles, as dB and dC (tiles, batch, cells, routes, N).
    To be summed over the programs of the first axis, and zeros at first: dA (.., K, N, channels), dD and dbias (.., K,
    channels), dweight (.., K, ranks, channels).
    Grid: (batch x chunks / span, tiles of channels, sequences of slots).
    """
    p_orders += tl.program_id(2) * K.DIRECTIONS + (1 if BACK else 0)
    o_sum = tl.program_id(0).to(tl.int64) * size.orders
    first = tl.program_id(0) * span
    for i in tl.range(first, tl.minimum(first + span, size.batch * size.chunks), disable_licm=True):
        i_b, i_t = (i // size.chunks).to(tl.int64), i % size.chunks
        # The tile's part of buffers by route.
        o_part = (tl.program_id(1) * size.batch + i_b) * size.cells * size.routes
        i_k = _order(p_orders, K)
        p_here = _image(p_slots, i_b, size, K)
        at = _place(p_here, i_b, i_t, i_k, size, K)
        _, _, _, o_c, m_t, _, m_c = at
        # (steps, channels)
        b_x = _tile(p_x, at, s.x, K)
        b_dy = _tile(p_grad, at, s_grad, K)
        if scale is not None:
            b_dy *= scale
        b_delta = _delta(p_delta, p_weight, p_bias, i_k, at, s, size, K)
        b_whole = _decaying(b_delta, p_gaps, p_bias, i_t, i_k, at, size, K)
        o_enter = (i_b * size.orders + i_k) * size.chunks + i_t
        b_dx = tl.zeros((STEPS, K.BC), tl.float32)
        b_ddelta = tl.zeros((STEPS, K.BC), tl.float32)
        for n in tl.range(K.N, disable_licm=True):
            # Cells are read anew, here and below: registers do not hold the addresses made of them.
            here = at
            if K.N > 1:
                tl.debug_barrier()
                here = _place(p_here, i_b, i_t, i_k, size, K)
            o_map, m_map = _by_route(i_k, here, size.routes, K)
            # (channels,); B and C (steps, 1)
            b_A = _rates(p_A, i_k, n, here, s.A)
            b_B = _projection(p_B, i_k, n, here, s.B, K)
            b_a = tl.exp2(b_whole * (b_A * LOG2_E)[None, :])
            # A product of delta and x would be kept over the states' loop.
            b_in = b_delta * (b_x * b_B)
            o_h = (o_enter * K.N + n) * size.channels + o_c
            b_s = _scan(b_a, b_in, tl.load(p_enter + o_h, mask=m_c, other=0.0), BACK)
            tl.store(p_dC + o_part * K.N + n + o_map * K.N, _over_channels(b_dy * b_s), mask=m_map)
            # The decayed part of a state is the state without the step's own input.
            b_s -= b_in
            tl.debug_barrier()
            here = _place(p_here, i_b, i_t, i_k, size, K)
            o_map, m_map = _by_route(i_k, here, size.routes, K)
            b_direct = b_dy * _projection(p_C, i_k, n, here, s.C, K)
            b_ds = _state_gradients(b_a, b_direct, tl.load(p_flow + o_h, mask=m_c, other=0.0), not BACK)
            b_dx += b_ds * b_B
            b_through = b_ds * b_s
            b_ddelta += b_through * b_A[None, :]
            tl.store(p_dB + o_part * K.N + n + o_map * K.N, _over_channels(b_ds * b_delta * b_x), mask=m_map)
            p_sum = p_dA + ((o_sum + i_k) * K.N + n) * size.channels + o_c
            _add_to(p_sum, tl.sum(b_through * b_whole, axis=0), m_c)
        at = _place(p_here, i_b, i_t, i_k, size, K)
        o_map, m_map = _by_route(i_k, at, size.routes, K)
        o_k = (o_sum + i_k) * size.channels + o_c
        if p_gaps is not None and p_dbias is not None:
            b_zero = _zero_step(p_bias, i_k, at, size, K)
            b_dzero = tl.sum(b_ddelta * _gaps(p_gaps, i_b, i_t, size, K), axis=0, keep_dims=True)
            if K.SOFTPLUS:
                b_dzero *= _softplus_gradient(b_zero)
            _add_to(p_dbias + o_k[None, :], b_dzero, m_c[None, :])
            tl.debug_barrier()
        b_ddelta += b_dx * b_x
        b_dx *= b_delta
        if K.SOFTPLUS:
            b_ddelta *= _softplus_gradient(b_delta)
        if p_dbias is not None:
            _add_to(p_dbias + o_k, tl.sum(b_ddelta, axis=0), m_c)
        if p_D is not None:
            b_dx += b_dy * _vector(p_D, i_k, at, size)[None, :]
            b_dD = tl.where(m_t[:, None], b_dy * b_x, 0.0) if K.TAIL else b_dy * b_x
            _add_to(p_dD + o_k, tl.sum(b_dD, axis=0), m_c)
        _store_tile(p_dx, p_add, b_dx, at, s_out, K)
        if K.RANK > 0:
            for r in tl.range(0, K.RANK, RANKS, disable_licm=True):
                o_r = r + tl.arange(0, RANKS)
                b_w = _weights(p_weight, i_k, o_r, at, size, K).to(tl.float32)
                b_dr = tl.dot(b_ddelta, b_w, input_precision=K.PRECISION)
                m_r = m_map[:, None] & (o_r < K.RANK)[None, :]
                tl.store((p_ddelta + o_part * K.RANK + o_r)[None, :] + o_map[:, None] * K.RANK, b_dr, mask=m_r)
                b_r = _low_rank(p_delta, i_k, o_r, at, s.delta, K).to(tl.float32)
                b_dw = tl.dot(tl.trans(b_r), b_ddelta, input_precision=K.PRECISION)
                o_w = ((o_sum + i_k) * K.RANK + o_r) * size.channels
                _add_to(p_dweight + o_w[:, None] + o_c[None, :], b_dw, (o_r < K.RANK)[:, None] & m_c[None, :])
        else:
            p_d = p_ddelta + i_b * size.cells * size.routes * size.channels + o_c
            b_ddelta = b_ddelta.to(p_ddelta.dtype.element_ty)
            tl.store(p_d[None, :] + (o_map * size.channels)[:, None], b_ddelta, mask=m_map[:, None] & m_c[None, :])
        # The next chunk adds to the sums.
        tl.debug_barrier()
