"""The 2-D recurrence of pLSTM: states on the edges of a grid, from all four corners.

An op of the cheap kind, in PyTorch, row by row. `plstm_2d` checks what it is given; mixers call `plstm_2d_op`, which
checks nothing: it scripts, traces and exports.

Gates are numbers per head and cell, so the output is `((q k^T) * G) v` over all cells, G being sums over paths. Within
a row, with A the products of `t_du` between two of its cells, the edges that leave row x towards the next are
`R_x = M_x R_(x-1) + N_x k v^T` and its cells read `P_x R_(x-1) + Q_x k v^T`, where M, N, P, Q have a row and a column a
cell. A row's part of G is then made of products of these small matrices, in a loop over rows, once from each side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_sizes, check_tensors
from visionmix.kernels.exported import is_symbolic, scan_states
from visionmix.kernels.registration import register_reference_op

_ROUNDS = 12  # of doubling, where a graph serves maps of up to 2 ** _ROUNDS rows


def plstm_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_r: Tensor,
    source_d: Tensor,
    transition_rl: Tensor,
    transition_du: Tensor,
    transition_ru: Tensor | None,
    transition_dl: Tensor | None,
    mark_l: Tensor,
    mark_u: Tensor,
    direct: Tensor,
) -> Tensor:
    """The linear recurrence of pLSTM on a grid, summed over the directions from its four corners.

    A cell (x, y) has matrix states on its edges: `l` and `u` arrive from (x-1, y) and (x, y-1), zeros at the border,
    and leave towards (x+1, y) and (x, y+1):

        y   = scale q (m_l l + m_u u)
        R   = t_rl l + t_ru u + s_r k^T v,    l(x+1, y) = R
        D   = t_du u + t_dl l + s_d k^T v,    u(x, y+1) = D

    The token itself is not in `y`; `direct scale (q k^T) v` is added once. The other directions run from the other
    corners, by gates of their own. Pöppel et al., 2025, pLSTM (arXiv 2506.11997).

    Args:
        q: queries (batch, rows, columns, heads, dk), of any floating-point dtype, as the others; x counts the rows.
        k: keys (batch, rows, columns, heads, dk).
        v: values (batch, rows, columns, heads, dv).
        source_r: s_r (batch, rows, columns, heads, 4) of each direction at each cell, as the other gates: from the
            first row and column, from the last row and first column, from the first row and last column, from the last
            row and column.
        source_d: s_d.
        transition_rl: t_rl.
        transition_du: t_du.
        transition_ru: t_ru, None for zeros.
        transition_dl: t_dl, None for zeros.
        mark_l: m_l.
        mark_u: m_u.
        direct: factor of the token itself (batch, rows, columns, heads).

    Returns:
        The output (batch, rows, columns, heads, dv) in float32, or float64 if any input is; so is the computation.
        `scale` is dk^-0.5.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together, or an axis but the batch is empty.
    """
    gates = {"source_r": source_r, "source_d": source_d, "transition_rl": transition_rl, "transition_du": transition_du}
    optional = {"transition_ru": transition_ru, "transition_dl": transition_dl}
    gates |= {**optional, "mark_l": mark_l, "mark_u": mark_u}
    tensors = {"q": q, "k": k, "v": v, **gates, "direct": direct}
    check_tensors(tensors, {name: (4 if name == "direct" else 5,) for name in tensors}, tensors.keys() - optional)
    check_sizes("q", q)
    check_sizes("v", v)
    axes = dict(zip(("batch", "rows", "columns", "heads"), q.shape, strict=False))
    check_shape("k", k, axes | {"dk": q.shape[4]})
    check_shape("v", v, axes | {"dv": v.shape[4]})
    for name, gate in gates.items():
        check_shape(name, gate, axes | {"directions": 4})
    check_shape("direct", direct, axes)
    transitions = (transition_rl, transition_du, transition_ru, transition_dl)
    return plstm_2d_op(q, k, v, (source_r, source_d), transitions, (mark_l, mark_u), direct)


def plstm_2d_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sources: tuple[Tensor, Tensor],
    transitions: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    marks: tuple[Tensor, Tensor],
    direct: Tensor,
) -> Tensor:
    """Return what `plstm_2d` does, without its checks; gates of a kind stand together, in its order."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (q, k, v, *sources, *transitions, *marks, direct))
    s_r, s_d = sources
    t_rl, t_du, t_ru, t_dl = transitions
    m_l, m_u = marks
    return torch.ops.visionmix.plstm_2d(q, k, v, s_r, s_d, t_rl, t_du, t_ru, t_dl, m_l, m_u, direct)


def _reference(arguments: tuple[Tensor | None, ...]) -> Tensor:
    return _forward(*arguments)


def _forward(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> Tensor:
    *gates, direct = gates
    dtype = dispatch.compute_dtype(q, k, v, direct, *gates)
    # Heads first, then rows and columns; gates with the directions before these.
    q, k, v = (x.permute(0, 3, 1, 2, 4).to(dtype) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    gates = [None if x is None else x.permute(0, 3, 4, 1, 2).to(dtype) for x in gates]
    from_the_top = _from_the_top_at_once if is_symbolic(q.shape[2], q.shape[3]) else _from_the_top
    out = (direct.permute(0, 3, 1, 2).to(dtype) * (q * k).sum(-1)).unsqueeze(-1) * v
    down = [None if x is None else x[:, :, 0::2] for x in gates]
    out = out + from_the_top(q, k, v, down)
    up = [None if x is None else x[:, :, 1::2].flip(3) for x in gates]
    out = out + from_the_top(q.flip(2), k.flip(2), v.flip(2), up).flip(2)
    return out.permute(0, 2, 3, 1, 4).contiguous()


def _from_the_top(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor | None]) -> Tensor:
    """Return the sum of the two directions that begin in the first row, from the first and from the last column.

    Shapes: q, k, v (batch, heads, rows, columns, dim), gates (batch, heads, 2, rows, columns).
    """
    rows, columns = q.shape[2], q.shape[3]
    read_own, leaves, reads, passes = _in_rows(gates, _along(gates[3]))
    keys, values = k.flatten(2, 3), v.flatten(2, 3)
    outs: list[Tensor] = []
    edges = leaves[:, :, :, 0, :, :0]  # weights of all cells so far in the edges that arrive
    for row in range(rows):
        seen = (row + 1) * columns
        weights = _times(reads[:, :, :, row], edges).sum(2)
        weights = torch.cat([weights, read_own[:, :, row]], dim=-1)
        scores = q[:, :, row] @ keys[:, :, :seen].transpose(-1, -2)
        outs.append((scores * weights) @ values[:, :, :seen])
        if row + 1 < rows:
            edges = torch.cat([_times(passes[:, :, :, row], edges), leaves[:, :, :, row]], dim=-1)
    return torch.stack(outs, dim=2)


def _in_rows(gates: list[Tensor | None], along: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the matrices Q (batch, heads, rows, columns, columns), N, P and M of each row.

    N, P and M have the directions before the rows. P and M have one column where they are diagonal.
    """
    source_r, source_d, transition_rl, _, transition_ru, transition_dl, mark_l, mark_u = gates
    emitted = along * source_d.unsqueeze(-2)  # u at a cell (row) of what a cell (column) sends out
    read_own = (mark_u.unsqueeze(-1) * emitted).sum(2)
    leaves = torch.diag_embed(source_r)
    if transition_ru is not None:
        leaves = leaves + transition_ru.unsqueeze(-1) * emitted
    # How the edges from the row before are read, and leave again.
    reads, passes = mark_l.unsqueeze(-1), transition_rl.unsqueeze(-1)
    if transition_dl is not None:
        turned = along * transition_dl.unsqueeze(-2)
        reads = torch.diag_embed(mark_l) + mark_u.unsqueeze(-1) * turned
        passes = torch.diag_embed(transition_rl)
        if transition_ru is not None:
            passes = passes + transition_ru.unsqueeze(-1) * turned
    return read_own, leaves, reads, passes


def _from_the_top_at_once(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor | None]) -> Tensor:
    """Return what `_from_the_top` does, in a graph that serves every map of up to 2 ** _ROUNDS rows.

    The weights of all cells in the edges of all rows are made by doubling, as states are in `scan_states`.
    """
    heads, (rows, columns) = q.shape[:2], q.shape[2:4]
    # Batch, heads and directions as one axis: with tensors of seven axes OpenVINO's results were wrong.
    read_own, *others = _in_rows(gates, _along_at_once(gates[3]))
    leaves, reads, passes = (x.flatten(0, 2) for x in others)
    same_row = _identity(rows, q).view(rows, 1, rows, 1)
    edges = (leaves.unsqueeze(-2) * same_row).flatten(-2)  # (..., rows, columns, rows x columns)
    if passes.shape[-1] == 1:
        passes = passes * _identity(columns, q)
    place = torch.arange(rows + 1, device=q.device)
    edges, passes = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (edges, passes))  # zeros before the first row
    for round_number in range(_ROUNDS):
        earlier = (place - (1 << round_number)).clamp(min=0)
        edges = edges + passes @ edges.index_select(1, earlier)
        passes = passes @ passes.index_select(1, earlier)
    weights = _times(reads, edges[:, :-1]).unflatten(0, (-1, 2)).sum(1)
    weights = weights + (read_own.flatten(0, 1).unsqueeze(-2) * same_row).flatten(-2)
    q, k, v = (x.flatten(0, 1).flatten(1, 2) for x in (q, k, v))
    out = (q @ k.transpose(-1, -2) * weights.flatten(1, 2)) @ v
    return out.unflatten(1, (rows, columns)).unflatten(0, heads)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return the product of a square matrix, or of a diagonal one given as a column, with x."""
    return matrix * x if matrix.shape[-1] == 1 and matrix.shape[-2] != 1 else matrix @ x


def _along(transition: Tensor) -> Tensor:
    """Return, for each row, the weight at each cell of what each other cell sends along the row, from either side.

    `A[y', y] = prod_(y < j < y') t_j` for y < y' in the first direction, the mirror image in the second.

    Shapes: (batch, heads, 2, rows, columns) to (batch, heads, 2, rows, columns, columns).
    """
    columns = transition.shape[-1]
    transition = torch.stack([transition[:, :, 0], transition[:, :, 1].flip(-1)], dim=2)
    one = torch.eye(columns, dtype=transition.dtype, device=transition.device)
    weight = torch.zeros_like(transition)
    weights = [weight]
    for column in range(columns - 1):
        weight = weight * transition[..., column : column + 1] + one[column]
        weights.append(weight)
    along = torch.stack(weights, dim=-2)
    return torch.stack([along[:, :, 0], along[:, :, 1].flip(-1, -2)], dim=2)


def _along_at_once(transition: Tensor) -> Tensor:
    """Return what `_along` does, in a graph that serves every width."""
    columns = transition.shape[-1]
    transition = torch.stack([transition[:, :, 0], transition[:, :, 1].flip(-1)], dim=2)
    decay = transition.flatten(0, 3).unsqueeze(-1)
    states = scan_states(decay, _identity(columns, transition).expand(decay.shape[0], -1, -1))
    along = F.pad(states, (0, 0, 1, 0))[:, :-1].unflatten(0, transition.shape[:4])
    return torch.stack([along[:, :, 0], along[:, :, 1].flip(-1, -2)], dim=2)


def _identity(size: int, like: Tensor) -> Tensor:
    place = torch.arange(size, device=like.device)
    return (place.unsqueeze(1) == place).to(like.dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> Tensor:
    return v.new_empty(v.shape, dtype=dispatch.compute_dtype(q, k, v, *gates))


def _flops(q, k, v, source_r, source_d, transition_rl, transition_du, transition_ru, transition_dl, *_) -> int:
    """q k and the sum of values for each pair of cells; the small products, where edges turn both ways, else a product
    of numbers for each pair and direction."""
    batch, rows, columns, heads, dk = q
    cells = rows * columns
    small = 4 * 2 * columns if transition_dl is not None else 4
    return batch * heads * cells * cells * (2 * (dk + v[-1]) + small)


_GATES = "Tensor transition_du, Tensor? transition_ru, Tensor? transition_dl, Tensor mark_l, Tensor mark_u"
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor source_r, Tensor source_d, Tensor transition_rl, "
    f"{_GATES}, Tensor direct) -> Tensor"
)
register_reference_op("plstm_2d", _SCHEMA, _forward, _flops, _fake)
