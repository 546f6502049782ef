"""The shapes that the Triton kernels are compiled, compared and timed for: those of published models, and odd ones."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels.gated_linear_attention import schema as attention
from visionmix.kernels.neighborhood_attention import schema as neighborhood
from visionmix.kernels.schema import Schema
from visionmix.kernels.selective_scan import schema as scan
from visionmix.kernels.selective_scan_2d import schema as scan_2d
from visionmix.scans.order_names import count_orders


class Tensors:
    """Makes a problem's tensors, standard normal, the same ones each time: on a device, or without memory on "meta".

    Attributes:
        dtype: That of activations; parameters are float32.
    """

    def __init__(self, dtype: torch.dtype, device: str = "meta", seed: int = 0):
        self.dtype, self.device = dtype, device
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def parameter(self, *shape: int) -> Tensor:
        """Return a float32 tensor."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def numbers(self, count: int) -> Tensor:
        """Return the int32 numbers from 0 to count - 1."""
        return torch.arange(count, dtype=torch.int32, device=self.device)

    def activation(self, *shape: int) -> Tensor:
        """Return a tensor of the activations' type."""
        return self.parameter(*shape).to(self.dtype)


@dataclass(frozen=True)
class Call:
    """One call of an op; calling it with a dtype makes the launches of both passes, on meta tensors.

    Attributes:
        schema: Of the op.
        arguments: Makes what the schema names; None where the kernels are not to run in the type.
    """

    schema: Schema
    arguments: Callable[[Tensors], tuple | None]

    def __call__(self, dtype: torch.dtype) -> None:
        """Run the Triton implementation's forward and backward functions."""
        arguments = self.arguments(Tensors(dtype))
        if arguments is None:
            return
        _, prefix, folder = self.schema.name.rpartition("bidirectional_")
        op = importlib.import_module(f"visionmix.kernels.{folder}.triton")
        outputs = getattr(op, f"{prefix}forward")(arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = dict(zip(self.schema.outputs, outputs, strict=True))
        given |= {f"grad_{name}": torch.empty_like(x) if x.numel() else None for name, x in given.items()}
        gradients = self.schema.Gradients(*(given[name] for name in self.schema.Gradients._fields))
        getattr(op, f"{prefix}backward")(arguments, gradients)


@dataclass(frozen=True)
class Problem:
    """A call with a name."""

    name: str
    run: Call


def gated_linear_attention(
    length: int, heads: int, dk: int, dv: int, *, batch: int = 1, bidirectional: bool = False, state: bool = False
) -> Call:
    """Return a call of `gated_linear_attention`, or the bidirectional form."""

    def arguments(make: Tensors) -> tuple:
        q, k, *gates = (make.activation(batch, length, heads, dk) for _ in range(3 + bidirectional))
        v = make.activation(batch, length, heads, dv)
        gates = [F.logsigmoid(g) for g in gates]
        if bidirectional:
            return attention.BidirectionalArguments(q, k, v, *gates, 1.0, "mean")
        first = make.parameter(batch, heads, dk, dv) if state else None
        return attention.Arguments(q, k, v, *gates, 1.0, first, state)

    return Call(attention.BIDIRECTIONAL_SCHEMA if bidirectional else attention.SCHEMA, arguments)


def _rates(make: Tensors, *shape: int) -> Tensor:
    return -make.parameter(*shape).abs() - 0.1


def selective_scan(
    dim: int,
    length: int,
    states: int,
    *,
    batch: int = 1,
    groups: int = 1,
    options: bool = True,
    gate: bool = True,
    constant: bool = False,
) -> Call:
    """Return a call of `selective_scan`; `options` are D, bias and softplus, and with `gate` z and the last state."""

    def arguments(make: Tensors) -> scan.Arguments:
        u, delta = (make.activation(batch, dim, length) for _ in range(2))
        delta = delta - 2 if options else F.softplus(delta - 2)
        A = _rates(make, dim, states)
        shape = (dim, states) if constant else (batch, groups, states, length)
        B, C = (make.activation(*shape) for _ in range(2))
        D, bias = (make.parameter(dim) if options else None for _ in range(2))
        z = make.activation(batch, dim, length) if options and gate else None
        return scan.Arguments(u, delta, A, B, C, D, z, bias, options, options and gate)

    return Call(scan.SCHEMA, arguments)


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
    kept: bool = False,
) -> Call:
    """Return a call of `selective_scan_2d`, with D, the bias and softplus; delta of low rank where `rank` is given.

    With `kept`, steps are given as cells, with gaps between them, as where tokens were taken out.
    """

    def arguments(make: Tensors) -> scan_2d.Arguments:
        count, cells = count_orders(orders), (batch, height, width)
        x, delta = make.activation(*cells, channels), make.activation(*cells, count, rank or channels)
        weight = make.activation(count, channels, rank) * rank**-0.5 if rank else None
        A = _rates(make, count, channels, states)
        B, C = (make.activation(*cells, count, states) for _ in range(2))
        D, bias = make.parameter(count, channels), make.parameter(count, channels) - 2
        steps = {}
        if kept:
            cells = make.numbers(height * width).expand(batch, count, -1)
            steps = {"cells": cells, "gaps": cells % 3}
        return scan_2d.Arguments(
            x, delta, weight, A, B, C, D, bias, True, orders, merge, "all", keep_states=True, **steps
        )

    return Call(scan_2d.SCHEMA, arguments)


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
) -> Call:
    """Return a call of `neighborhood_attention`, the window the same on all axes; none in float32 with `half_only`."""

    def arguments(make: Tensors) -> neighborhood.Arguments | None:
        if half_only and make.dtype == torch.float32:
            return None
        groups, axes = key_heads or heads, len(grid)
        query, key, value = (make.activation(batch, *grid, count, dim) for count in (heads, groups, groups))
        extras = [make.activation(batch, extra, groups, dim) if extra else None for _ in range(2)]
        table = make.parameter(heads, *[2 * kernel_size - 1] * axes) if bias else None
        window = ([x] * axes for x in (kernel_size, stride, dilation, int(causal)))
        return neighborhood.Arguments(query, key, value, *window, dim**-0.5, *extras, table, circular)

    return Call(neighborhood.SCHEMA, arguments)


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
        Problem("what is left, rank 24", selective_scan_2d(1, 137, 384, 1, rank=24, batch=8, kept=True)),
        Problem("what is left, 16 states", selective_scan_2d(1, 137, 96, 16, batch=8, kept=True)),
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

# At these sizes a GPU is full, but for the single image: the ops are timed beside their peers there.
BENCHMARKS = {
    "selective_scan": [Problem("16x384x3136, 16 states", selective_scan(384, 3136, 16, batch=16, gate=False))],
    "selective_scan_2d": [
        Problem("128x56x56x96, 4 orders, rank 6", selective_scan_2d(56, 56, 96, 1, rank=6, batch=128)),
        Problem("1x56x56x96, 4 orders, rank 6", selective_scan_2d(56, 56, 96, 1, rank=6)),
    ],
    "gated_linear_attention": [
        Problem("16x4096, 12 heads, dk 32, dv 64", gated_linear_attention(4096, 12, 32, 64, batch=16)),
    ],
    "neighborhood_attention": [
        Problem("128x56x56, kernel 7, 3 heads of 32", neighborhood_attention((56, 56), 3, 32, 7, batch=128, bias=True)),
    ],
}

# Of each op's kind, small enough for Triton's interpreter.
TINY = {
    "gated_linear_attention": [Problem("1x6, 1 head", gated_linear_attention(6, 1, 16, 16))],
    "selective_scan": [Problem("1x4x20, 2 states", selective_scan(4, 20, 2))],
    "selective_scan_2d": [Problem("1x4x3x8, 4 orders, rank 2", selective_scan_2d(4, 3, 8, 1, rank=2))],
    "neighborhood_attention": [Problem("1x5x4, kernel 3", neighborhood_attention((5, 4), 1, 8, 3, bias=True))],
}
