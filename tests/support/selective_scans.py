"""Arguments of the selective scans for tests, sequences of orders among them, and what is asked of both scans."""

import pytest
import torch
from tolerance import gradients

from visionmix.kernels import backends, use

CROSS = ("raster", "raster_transposed", "raster_reversed", "raster_transposed_reversed")
ORDERS = {
    "cross": CROSS,
    "one": ("hilbert",),
    "windows": ("raster", "column", "window_2", "window_3_reversed"),  # padded steps, unequal lengths
    "skip": ("skip_2_0_0", "skip_2_0_1_transposed", "skip_2_0_1", "skip_2_1_1_transposed"),  # each cell in one order
    "joined": ("raster_reversed+raster_transposed+raster_transposed_reversed", "snake"),  # a cell read three times
    "unswapped": ("column_unswapped", "raster"),  # the inverse is not that of the index
}


@pytest.fixture(autouse=True)
def compiled():
    """Run the compiled kernels in every test of a module that imports this."""
    if (reason := backends()["selective_scan"]["cpu"]) != "ready":
        pytest.skip(reason)
    with use("cpu"):
        yield


def scan_inputs(
    batch=2, dim=4, length=20, states=3, B="1", C="1", options="D z delta_bias", seed=0, dtype=torch.float64
):
    """Arguments by name; B and C are "constant", "ungrouped" or a number of groups."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def projection(kind):
        if kind == "constant":
            return random(dim, states)
        return random(batch, states, length) if kind == "ungrouped" else random(batch, int(kind), states, length)

    arguments = {
        "u": random(batch, dim, length),
        "delta": random(batch, dim, length).abs() * 0.5,
        "A": -random(dim, states).exp(),
        "B": projection(B),
        "C": projection(C),
        "D": random(dim),
        "z": random(batch, dim, length),
        "delta_bias": random(dim).abs(),  # steps stay positive without softplus: the state decays
    }
    names = ["u", "delta", "A", "B", "C", *options.split()]
    return {name: arguments[name].to(dtype).requires_grad_() for name in names}


def scan_2d_inputs(
    batch=2, height=3, width=4, channels=3, states=2, orders=CROSS, rank=None, seed=0, dtype=torch.float64
):
    """Arguments by name; with a rank, "delta" has that many features, which "weight" takes to the channels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps, count = (batch, height, width, len(orders)), len(orders)
    arguments = {
        "x": random(batch, height, width, channels),
        "delta": random(*maps, rank or channels),
        "A": -random(count, channels, states).exp(),
        "B": random(*maps, states),
        "C": random(*maps, states),
        "D": random(count, channels),
        "delta_bias": random(count, channels).abs(),
        "weight": random(count, channels, rank or 1),
    }
    if rank is None:
        del arguments["weight"]
    return {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}


def call_2d(function, arguments, **options):
    """Call selective_scan_2d, or its definition, with what `scan_2d_inputs` returns."""
    arguments = dict(arguments)
    if "weight" in arguments:
        arguments["delta"] = (arguments["delta"], arguments.pop("weight"))
    return function(**arguments, **options)


def doubles(arguments):
    """Return copies of the arguments in float64."""
    return {name: x.detach().double().requires_grad_() for name, x in arguments.items()}


def assert_strides_are_read(function, arguments, **options):
    """Run `function` on the tensors and on dense copies of them: outputs and gradients have the same bits."""
    copies = {name: x.clone(memory_format=torch.contiguous_format).requires_grad_() for name, x in arguments.items()}
    arguments = {name: x.requires_grad_() for name, x in arguments.items()}
    actual, expected = function(**arguments, **options), function(**copies, **options)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    assert all(
        map(torch.equal, gradients(actual, list(arguments.values())), gradients(expected, list(copies.values())))
    )
