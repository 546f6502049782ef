"""The shapes that the Triton kernels are compiled for ahead of time: those of published models, and odd ones."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmix.kernels.gated_linear_attention import schema as attention
from visionmix.kernels.neighborhood_attention import schema as neighborhood
from visionmix.kernels.selective_scan import schema as scan
from visionmix.kernels.selective_scan_2d import schema as scan_2d
from visionmix.scans.order_names import count_orders, count_routes


@dataclass(frozen=True)
class Problem:
    """One call of an op, forward and backward, on meta tensors: `run(dtype)` makes its launches."""

    name: str
    run: Callable[[torch.dtype], None]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _triton(op: str):
    return importlib.import_module(f"visionmix.kernels.{op}.triton")


def gated_linear_attention(
    length: int, heads: int, dk: int, dv: int, *, batch: int = 1, bidirectional: bool = False, state: bool = False
) -> Callable[[torch.dtype], None]:
    """Return the run of `gated_linear_attention`, or the bidirectional form."""

    def run(dtype: torch.dtype) -> None:
        op = _triton("gated_linear_attention")
        q, k, g, g_backward = (_empty(batch, length, heads, dk, dtype=dtype) for _ in range(4))
        v, grad_out = (_empty(batch, length, heads, dv, dtype=dtype) for _ in range(2))
        if bidirectional:
            both = attention.BidirectionalArguments(q, k, v, g, g_backward, 1.0, "mean")
            op.bidirectional_forward(both)
            op.bidirectional_backward(both, attention.BidirectionalGradients(grad_out))
            return
        first, grad_last = (_empty(batch, heads, dk, dv) if state else None for _ in range(2))
        arguments = attention.Arguments(q, k, v, g, 1.0, first, state)
        op.forward(arguments)
        op.backward(arguments, attention.Gradients(grad_out, grad_last))

    return run


def selective_scan(
    dim: int, length: int, states: int, *, batch: int = 1, groups: int = 1, options: bool = True, constant: bool = False
) -> Callable[[torch.dtype], None]:
    """Return the run of `selective_scan`; `options` are D, z, the bias, softplus and the last state."""

    def run(dtype: torch.dtype) -> None:
        op = _triton("selective_scan")
        u, delta, z, grad_out = (_empty(batch, dim, length, dtype=dtype) for _ in range(4))
        A, D, bias = _empty(dim, states), _empty(dim), _empty(dim)
        shape = (dim, states) if constant else (batch, groups, states, length)
        B, C = (_empty(*shape, dtype=dtype) for _ in range(2))
        given = (D, z, bias) if options else (None, None, None)
        arguments = scan.Arguments(u, delta, A, B, C, *given, options, options)
        op.forward(arguments)
        op.backward(arguments, scan.Gradients(grad_out, _empty(batch, dim, states) if options else None, None))

    return run


CROSS = "raster,raster_transposed,raster_reversed,raster_transposed_reversed"


def selective_scan_2d(
    height: int,
    width: int,
    channels: int,
    states: int,
    *,
    batch: int = 1,
    rank: int = 0,
    orders: str = CROSS,
    merge: str = "sum",
) -> Callable[[torch.dtype], None]:
    """Return the run of `selective_scan_2d`, with D, the bias and softplus; delta of low rank where `rank` is given."""

    def run(dtype: torch.dtype) -> None:
        op = _triton("selective_scan_2d")
        count = count_orders(orders)
        x, grad_out = (_empty(batch, height, width, channels, dtype=dtype) for _ in range(2))
        if merge == "none":
            grad_out = _empty(batch, height, width, count_routes(orders), channels, dtype=dtype)
        delta = _empty(batch, height, width, count, rank or channels, dtype=dtype)
        weight = _empty(count, channels, rank, dtype=dtype) if rank else None
        B, C = (_empty(batch, height, width, count, states, dtype=dtype) for _ in range(2))
        D, bias = (_empty(count, channels) for _ in range(2))
        tensors = (x, delta, weight, _empty(count, channels, states), B, C, D, bias)
        arguments = scan_2d.Arguments(*tensors, True, orders, merge, "all", keep_states=True)
        _, entering = op.forward(arguments)
        op.backward(arguments, scan_2d.Gradients(grad_out, entering))

    return run


def neighborhood_attention(
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    kernel_size: int,
    *,
    batch: int = 1,
    key_heads: int = 0,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    extra: int = 0,
    bias: bool = False,
    circular: bool = False,
    half_only: bool = False,
) -> Callable[[torch.dtype], None]:
    """Return the run of `neighborhood_attention`, the window the same on all axes; none in float32 with `half_only`."""

    def run(dtype: torch.dtype) -> None:
        if half_only and dtype == torch.float32:
            return
        op = _triton("neighborhood_attention")
        groups, axes = key_heads or heads, len(grid)
        q, grad_out, out = (_empty(batch, *grid, heads, dim, dtype=dtype) for _ in range(3))
        k, v = (_empty(batch, *grid, groups, dim, dtype=dtype) for _ in range(2))
        lse, grad_lse = (_empty(batch, *grid, heads) for _ in range(2))
        extras = [_empty(batch, extra, groups, dim, dtype=dtype) if extra else None for _ in range(2)]
        table = _empty(heads, *[2 * kernel_size - 1] * axes) if bias else None
        window = ([x] * axes for x in (kernel_size, stride, dilation, int(causal)))
        options = (*window, dim**-0.5, *extras, table, circular)
        arguments = neighborhood.Arguments(q, k, v, *options)
        op.forward(arguments)
        op.backward(arguments, neighborhood.Gradients(grad_out, grad_lse, out, lse))

    return run


PROBLEMS = {
    "gated_linear_attention": [
        Problem("vig_s 14x14", gated_linear_attention(196, 6, 32, 64, bidirectional=True)),
        Problem("vig_s 7x7", gated_linear_attention(49, 6, 32, 64, bidirectional=True)),
        Problem("one direction 14x14", gated_linear_attention(196, 6, 32, 64)),
        Problem("one direction 14x14, states", gated_linear_attention(196, 6, 32, 64, state=True)),
        Problem("dk 16, dv 32", gated_linear_attention(196, 3, 16, 32, bidirectional=True)),
        Problem("dk 64, dv 128", gated_linear_attention(196, 3, 64, 128, bidirectional=True)),
        Problem("dk 128, dv 256", gated_linear_attention(4096, 4, 128, 256, state=True)),
        Problem("4x4", gated_linear_attention(16, 6, 32, 64, bidirectional=True)),
        Problem("5x6", gated_linear_attention(30, 6, 32, 64, bidirectional=True)),
        Problem("dk 24, dv 40, states", gated_linear_attention(100, 3, 24, 40, state=True)),
    ],
    "selective_scan": [
        Problem("vim_tiny 14x14", selective_scan(384, 197, 16)),
        Problem("56x56, 16 states", selective_scan(384, 3136, 16)),
        Problem("one state", selective_scan(96, 3136, 1)),
        Problem("no options", selective_scan(96, 196, 16, options=False)),
        Problem("constant B and C", selective_scan(96, 196, 4, constant=True)),
        Problem("four groups", selective_scan(96, 49, 16, groups=4)),
    ],
    "selective_scan_2d": [
        Problem("vmamba_tiny stage 1", selective_scan_2d(56, 56, 96, 1, rank=6)),
        Problem("vmamba_tiny stage 1, merged", selective_scan_2d(56, 56, 96, 1, rank=6, batch=128)),
        Problem("vmamba_tiny stage 2, merged", selective_scan_2d(28, 28, 192, 1, rank=12, batch=128)),
        Problem("vmamba_tiny stage 4, merged", selective_scan_2d(7, 7, 768, 1, rank=48, batch=128)),
        Problem("full delta", selective_scan_2d(14, 14, 96, 1)),
        Problem("16 states", selective_scan_2d(14, 14, 96, 16, rank=6)),
        Problem("windows, not merged", selective_scan_2d(13, 9, 96, 16, orders="window_2,raster", merge="none")),
        Problem("joined", selective_scan_2d(28, 28, 192, 1, rank=12, orders="raster+raster_reversed", batch=128)),
    ],
    "neighborhood_attention": [
        Problem("nat_mini stage 1", neighborhood_attention((56, 56), 2, 32, 7, bias=True)),
        Problem("nat_mini stage 4", neighborhood_attention((7, 7), 16, 32, 7, bias=True)),
        Problem("dilation 8", neighborhood_attention((56, 56), 3, 32, 7, dilation=8)),
        Problem("heads of 64", neighborhood_attention((56, 56), 3, 64, 7, bias=True)),
        Problem("heads of 64, additional keys", neighborhood_attention((14, 14), 4, 64, 7, extra=77, key_heads=2)),
        Problem("heads of 128", neighborhood_attention((14, 14), 2, 128, 7, bias=True, extra=4, half_only=True)),
        Problem("heads of 20", neighborhood_attention((14, 14), 2, 20, 7, bias=True, extra=1)),
        Problem("sequence, causal", neighborhood_attention((4096,), 2, 64, 63, stride=31, causal=True)),
        Problem("disc", neighborhood_attention((64, 64), 2, 64, 31, circular=True, extra=77)),
        Problem("volume", neighborhood_attention((16, 28, 28), 2, 32, 5, stride=2, bias=True)),
    ],
}
