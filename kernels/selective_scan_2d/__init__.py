"""The selective scan over several orders of a map.

`selective_scan_2d` checks what it is given. Mixers call `selective_scan_2d_op`, which checks nothing: it scripts,
traces and exports.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionmix import scans
from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_merge, check_out_dtype, check_shape, check_sizes, check_tensors
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return the selective scan over several orders of a map; `orders` are their names joined by commas.

    `delta` is (batch, height, width, K, channels), or (batch, height, width, K, rank) with `delta_weight`. `permute` is
    "all", or "input" where delta, B and C stay in raster order. The output has `out_dtype`, or x's type if None:
    torch.float32 where a norm follows that needs what half precision cannot hold.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            options = (delta_softplus, orders, merge, permute)
            arguments = Arguments(x, delta, delta_weight, A, B, C, D, delta_bias, *options, out_dtype=out_dtype)
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


def selective_scan_2d(
    x: Tensor, delta: Tensor | tuple[Tensor, Tensor], A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, orders: Sequence[str] = _CROSS,
    merge: str = "sum", permute: str = "all", out_dtype: torch.dtype | None = None,
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
        orders: the names of the K orders, as `visionmix.scans.order` takes them; the default is VMamba's cross scan.
        merge: "sum" or "mean" of the directions, or "none" for all of them.
        permute: "all" reads x, delta, B and C in the orders, "input" x alone.
        out_dtype: type of the output, x's if None. Under mixed precision torch.float32 keeps outputs that half
            precision cannot hold, or would round, until the norm after the scan brings them back to its range.

    Returns:
        (batch, height, width, channels) in `out_dtype`; for `merge="none"` (batch, height, width, routes, channels), a
        route for each order and for each of those joined by "+". A cell that an order does not read gets zero from it,
        and "mean" divides by the number of all routes. Computed in float32, or float64 if any input is.

    Raises:
        TypeError: an argument is not a real floating-point tensor, `orders` is not a sequence of names, or `out_dtype`
            is not a dtype.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, or an order, `merge` or
            `permute` is unknown, or an order does not have one step per cell for `permute="input"`, or `out_dtype` is
            not of floating-point numbers.
    """
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
    _check_orders(orders, permute, height, width)
    states = A.shape[2]
    parameters = {"K": len(orders), "channels": channels}
    maps = {"batch": batch, "height": height, "width": width, "K": len(orders)}
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
    options = (delta_softplus, join_orders(orders), merge, permute, out_dtype)
    return selective_scan_2d_op(x, delta, weight, A, B, C, D, delta_bias, *options)
