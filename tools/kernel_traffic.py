"""Count the bytes and operations of the Triton kernels against the least possible, for published models' layers.

    python tools/kernel_traffic.py

Prints a table in Markdown, forward and backward of one image in bfloat16. Bytes moved are what the planned launches
read and write, with what other programs read again and with scratch and partial buffers; caches may save a part. The
sums that PyTorch makes of partial buffers are not counted. The least is every input once and every output once.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import torch

from visionmix.kernels.gpu import Target, plan
from visionmix.scans.order_names import count_orders
from visionmix.tools.kernel_problems import CROSS, gated_linear_attention, neighborhood_attention, selective_scan_2d

_ELEMENT = 2


@dataclass(frozen=True)
class Layer:
    """One op of a model: how often the model calls it, its launches and the least bytes of forward and backward."""

    model: str
    stage: str
    calls: int
    run: Callable[[torch.dtype], None]
    forward: int
    backward: int


def vig(pixels: int) -> list[Layer]:
    """Return vig_s's op: 12 blocks of 6 heads, dk 32, dv 64, on a map of a sixteenth of the pixels per side."""
    tokens, heads, dk, dv = (pixels // 16) ** 2, 6, 32, 64
    read = tokens * heads * (4 * dk + dv) * _ELEMENT
    out = tokens * heads * dv * _ELEMENT
    run = gated_linear_attention(tokens, heads, dk, dv, bidirectional=True)
    return [Layer("vig_s", f"{pixels // 16}x{pixels // 16}", 12, run, read + out, 2 * read + out)]


def _scan(model: str, side: int, channels: int, rank: int, calls: int, orders: str) -> Layer:
    count = count_orders(orders)
    cells = side * side
    steps = count * (rank + 2) * cells * _ELEMENT
    parameters = count * channels * (rank * _ELEMENT + 3 * 4)
    read = cells * channels * _ELEMENT + steps + parameters
    out = cells * channels * _ELEMENT
    run = selective_scan_2d(side, side, channels, 1, rank=rank, orders=orders)
    name = f"{side}x{side}, {channels} channels, {count} parameter set{'s' if count > 1 else ''}"
    return Layer(model, name, calls, run, read + out, 2 * read + out)


def vmamba(pixels: int) -> list[Layer]:
    """Return vmamba_tiny's scans: the cross scan, one state, expansion 1."""
    return [
        _scan("vmamba_tiny", pixels // (4 << stage), 96 << stage, 6 << stage, depth, CROSS)
        for stage, depth in enumerate((2, 2, 8, 2))
    ]


def msvmamba(pixels: int) -> list[Layer]:
    """Return msvmamba_tiny's scans: one order of the full map, the three others joined on the map of half the side."""
    layers = []
    for stage, depth in enumerate((1, 2, 9, 2)):
        side, channels, rank = pixels // (4 << stage), 2 * 96 << stage, 6 << stage
        joined = "raster_transposed+raster_reversed+raster_transposed_reversed"
        layers.append(_scan("msvmamba_tiny", side, channels, rank, depth, "raster"))
        layers.append(_scan("msvmamba_tiny", -(-side // 2), channels, rank, depth, joined))
    return layers


def nat(pixels: int) -> list[Layer]:
    """Return nat_mini's attention: windows of 7x7 with position biases, heads of 32 channels."""
    layers = []
    for stage, depth in enumerate((3, 4, 6, 5)):
        side, heads, dim, kernel_size = pixels // (4 << stage), 2 << stage, 32, 7
        tokens = side * side * heads
        map_bytes, lse, table = tokens * dim * _ELEMENT, tokens * 4, heads * (2 * kernel_size - 1) ** 2 * 4
        # Backward reads what forward read and wrote and grad_out, and writes the gradients of q, k, v and the biases.
        forward, backward = 4 * map_bytes + lse + table, 8 * map_bytes + lse + 2 * table
        run = neighborhood_attention((side, side), heads, dim, kernel_size, bias=True)
        layers.append(Layer("nat_mini", f"{side}x{side}, {heads} heads", depth, run, forward, backward))
    return layers


def rows(target: Target) -> list[str]:
    """Return the table's lines."""
    lines = [
        "| model | pixels | map | calls | forward MB, least | moved | backward MB, least | moved | GFLOP |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in (vig, vmamba, msvmamba, nat):
        for pixels in (224, 1024):
            for layer in model(pixels):
                with plan(target) as launches:
                    layer.run(torch.bfloat16)
                # The forward pass writes the first output, maybe in several launches; all up to these are its own.
                names = [launch.kernel.fn.__qualname__ for launch in launches]
                ends = ("mix_kernel", "forward_kernel", "outputs_kernel")
                first = next(i for i, name in enumerate(names) if name.endswith(ends))
                cut = first + len(list(takewhile(names[first].__eq__, names[first:])))
                forward, backward = (
                    sum(launch.bytes_moved() for launch in part) for part in (launches[:cut], launches[cut:])
                )
                flops = sum(launch.flops for launch in launches)
                lines.append(
                    f"| {layer.model} | {pixels} | {layer.stage} | {layer.calls} | {layer.forward / 1e6:.2f} | "
                    f"{forward / 1e6:.2f} ({forward / layer.forward:.1f}x) | {layer.backward / 1e6:.2f} | "
                    f"{backward / 1e6:.2f} ({backward / layer.backward:.1f}x) | {flops / 1e9:.2f} |"
                )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    argparse.ArgumentParser(prog="visionmix kernel-traffic", description=__doc__.split("\n", 1)[0]).parse_args(argv)
    print("\n".join(rows(Target("cuda", 90))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
