"""The selective scan over several orders of a map.

`selective_scan_2d` checks what it is given. Mixers call `selective_scan_2d_op`, which checks nothing: it scripts,
traces and exports.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionmix import scans
from visionmix.kernels import dispatch
from visionmix.kernels.checks import (
    check_flags,
    check_merge,
    check_out_dtype,
    check_shape,
    check_sizes,
    check_steps,
    check_tensors,
)
from visionmix.kernels.selective_scan_2d import op as _registered  # noqa: F401
from visionmix.kernels.selective_scan_2d import reference
from visionmix.kernels.selective_scan_2d.schema import Arguments
from visionmix.scans.order_names import join_orders

__all__ = ["selective_scan_2d", "selective_scan_2d_op"]

_CROSS = ("raster", "raster_transposed", "raster_reversed", "raster_transposed_reversed")
_RANKS = {"x": 4, "delta": 5, "delta_weight": 3, "A": 3, "B": 5, "C": 5, "D": 2, "delta_bias": 2}


def selective_scan_2d_op(
    x: Tensor, delta: Tensor, delta_weight: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, orders: str, merge: str, permute: str = "all",
    out_dtype: torch.dtype | None = None, cells: Tensor | None = None, gaps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the selective scan over several orders of a map; `orders` are their names joined by commas.

    With `cells` the names are not read.

    `delta` is (batch, height, width, K, channels), or (batch, height, width, K, rank) with `delta_weight`. `permute` is
    "all", or "input" where delta, B and C stay in raster order. The output has `out_dtype`, or x's type if None:
    torch.float32 where a norm follows that needs what half precision cannot hold.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            options = (delta_softplus, orders, merge, permute)
            arguments = Arguments(
                x, delta, delta_weight, A, B, C, D, delta_bias, *options, out_dtype=out_dtype, cells=cells, gaps=gaps
            )
            out, _ = dispatch.call_reference(reference.forward, arguments)
            return out
    # A graph made by torch.jit.trace must not depend on the mode: its backward pass finds the states again.
    keep_states = torch.is_grad_enabled() and not torch.jit.is_tracing()
    out, _ = torch.ops.visionmix.selective_scan_2d(
        x,
        delta,
        delta_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        delta_softplus,
        orders,
        merge,
        permute,
        keep_states,
        "auto",
        out_dtype,
        cells,
        gaps,
    )
    return out


def _check_orders(orders: Sequence[str], permute: str, height: int, width: int) -> None:
    if isinstance(orders, str) or not all(isinstance(name, str) for name in orders):
        raise TypeError(f"orders={orders!r} is not a sequence of names; pass them as ('raster', 'raster_reversed')")
    if not orders:
        raise ValueError("orders is empty; pass the name of at least one scan order")
    for name in orders:
        steps = scans.num_steps(name, height, width)
        if permute == "input" and steps != height * width:
            raise ValueError(
                f"permute='input' takes orders of one step per cell, but {name!r} has {steps} steps on a "
                f"{height}x{width} grid; choose an order that reads each cell once, or permute='all'"
            )


def _check_cells(
    x: Tensor, orders: Sequence[str] | None, permute: str, cells: Tensor | None, gaps: Tensor | None
) -> None:
    if cells is None:
        raise ValueError("gaps are those between the steps of cells=None; give cells too")
    if orders is not None:
        raise ValueError(f"orders={orders!r} and cells both give the steps; leave one of them out")
    batch, height, width, _ = x.shape
    for name, steps in (("cells", cells), ("gaps", gaps)):
        check_steps(name, steps, x, batch)
    check_shape("gaps", gaps, dict(zip(("batch", "K", "steps"), cells.shape, strict=True)))
    size = height * width
    if permute == "input" and cells.shape[2] > size:
        raise ValueError(
            f"permute='input' has a step for each of the {height * width} cells at most, and cells has "
            f"{cells.shape[2]}; give fewer, or permute='all'"
        )
    if torch.compiler.is_compiling() or not cells.numel():
        return
    if not -1 <= int(cells.min()) <= int(cells.max()) < size:
        raise ValueError(
            f"cells has numbers from {int(cells.min())} to {int(cells.max())}; those of a {height}x{width} map go from "
            f"0 to {size - 1}, and -1 is a padded step"
        )
    ranked = cells.sort(dim=2).values
    if bool(((ranked.diff(dim=2) == 0) & (ranked[..., 1:] >= 0)).any()):
        raise ValueError("cells has a cell twice in one order; give each order a cell once at most")
    if gaps is not None and int(gaps.min()) < 0:
        raise ValueError(f"gaps has numbers down to {int(gaps.min())}; give numbers of places, 0 or more")


def selective_scan_2d(
    x: Tensor, delta: Tensor | tuple[Tensor, Tensor], A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, orders: Sequence[str] | None = None,
    merge: str = "sum", permute: str = "all", out_dtype: torch.dtype | None = None, *, cells: Tensor | None = None,
    gaps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The selective scan of a map in K orders, each with its own parameters, brought back to the map and merged.

    Each order is a `selective_scan` of the sequence of cells that it reads; the output of a step goes to the cell that
    was read there. A padded step of an order reads zeros (x, B, C and delta before the bias), so that the state still
    decays by `exp(softplus(delta_bias) A)`, as in LocalMamba. Orders joined by "+" are one sequence with one set of
    parameters, which reads a cell several times. Liu et al., 2024, VMamba: Visual State Space Model (arXiv 2401.10166).

    With o(t) the cell of step t, and p(t) = o(t) for `permute="all"` or p(t) = t, raster order, for "input":

        h_t     = exp(delta_p(t) A) h_(t-1) + delta_p(t) B_p(t) x_o(t)
        y_o(t)  = C_p(t) h_t + D x_o(t)

    "input" is the scan of Yang et al., 2024, PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition (arXiv
    2403.17695). The vector that PlainMamba adds to B at step t, for the move that led there, needs no argument: B is
    read in raster order, so the caller adds the vector of entry t of `visionmix.scans.move_codes` to B at cell t.

    Where tokens were taken out of the map, in every image others, `cells` gives the steps in place of names, and `gaps`
    how many places of the whole map's order each step crosses first. On its way to step t the state decays by
    `exp((delta_p(t) + gaps_t s) A)`, where s is the step of a token of zeros, `delta_bias`, through softplus with
    `delta_softplus`. So with the tokens that are left as a map of one row, (batch, 1, tokens, channels), it is the scan
    of the whole map with zeros in the places of the others (x, B, C and delta before the bias), read at the tokens
    that are left; `visionmix.scans.kept_steps` makes both tensors.

    Args:
        x: input (batch, height, width, channels), of any floating-point dtype, as the others.
        delta: step sizes (batch, height, width, K, channels), or of low rank as a pair ((batch, height, width, K,
            rank), weight (K, channels, rank)).
        A: decay rates (K, channels, states), real and usually negative.
        B: input projection (batch, height, width, K, states).
        C: output projection (batch, height, width, K, states).
        D: skip (K, channels).
        delta_bias: added to delta (K, channels).
        delta_softplus: whether delta goes through softplus.
        orders: the names of the K orders, as `visionmix.scans.order` takes them; None for VMamba's cross scan, or with
            `cells`.
        merge: "sum" or "mean" of the directions, or "none" for all of them.
        permute: "all" reads x, delta, B and C in the orders, "input" x alone.
        out_dtype: type of the output, x's if None. Under mixed precision torch.float32 keeps outputs that half
            precision cannot hold, or would round, until the norm after the scan brings them back to its range.
        cells: int32 or int64 (batch, K, steps), the cell in row-major order that each step reads, -1 for a padded step;
            an order reads a cell once at most.
        gaps: int32 or int64 (batch, K, steps), the places without a token between a step and the one before it, or
            before the first.

    Returns:
        (batch, height, width, channels) in `out_dtype`; for `merge="none"` (batch, height, width, routes, channels), a
        route for each order and for each of those joined by "+". A cell that an order does not read gets zero from it,
        and "mean" divides by the number of all routes. Computed in float32, or float64 if any input is.

    Raises:
        TypeError: an argument is not a real floating-point tensor, `orders` is not a sequence of names,
            `delta_softplus` is no bool, `out_dtype` is no dtype, or `cells` or `gaps` is not a tensor of integers.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, or an order, `merge` or
            `permute` is unknown, or an order does not have one step per cell for `permute="input"`, or `out_dtype` is
            not of floating-point numbers; there are `gaps` without `cells`, or `orders` beside them, or `cells` lie
            outside the map or come twice (not checked while a graph is being made).
    """
    check_flags(delta_softplus=delta_softplus)
    check_out_dtype(out_dtype)
    delta, weight = delta if isinstance(delta, tuple | list) else (delta, None)
    tensors = {"x": x, "delta": delta, "delta_weight": weight, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    check_tensors(tensors, {name: (rank,) for name, rank in _RANKS.items()}, ("x", "delta", "A", "B", "C"))
    check_merge(merge, ("sum", "mean", "none"))
    if permute not in ("all", "input"):
        raise ValueError(f"permute={permute!r} is unknown; choose one of 'all', 'input'")
    batch, height, width, channels = x.shape
    check_sizes("x", x)
    check_sizes("A", A)
    if cells is not None or gaps is not None:
        _check_cells(x, orders, permute, cells, gaps)
        count, names = cells.shape[1], ""
    else:
        orders = _CROSS if orders is None else orders
        _check_orders(orders, permute, height, width)
        count, names = len(orders), join_orders(orders)
    states = A.shape[2]
    parameters = {"K": count, "channels": channels}
    maps = {"batch": batch, "height": height, "width": width, "K": count}
    check_shape("A", A, parameters | {"states": states})
    check_shape("B", B, maps | {"states": states})
    check_shape("C", C, maps | {"states": states})
    check_shape("D", D, parameters)
    check_shape("delta_bias", delta_bias, parameters)
    if weight is None:
        check_shape("delta", delta, maps | {"channels": channels})
    else:
        check_shape("delta", delta, maps | {"rank": weight.shape[2]})
        check_shape("delta_weight", weight, parameters | {"rank": weight.shape[2]})
    options = (delta_softplus, names, merge, permute, out_dtype, cells, gaps)
    return selective_scan_2d_op(x, delta, weight, A, B, C, D, delta_bias, *options)
