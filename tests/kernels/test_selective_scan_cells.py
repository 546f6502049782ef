"""The selective scan of what is left of a map: steps given as cells, and gaps between them."""

import pytest
import torch
from choices import CHOICES, choose
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scans import CROSS, call_2d, scan_2d_inputs
from strategies import sizes
from tolerance import assert_close, assert_gradients_close, gradients
from torch.utils.flop_counter import FlopCounterMode

from visionmix import scans
from visionmix.kernels import selective_scan_2d, use
from visionmix.kernels.selective_scan_2d import definition, selective_scan_2d_op

ORDERS = (*CROSS, "hilbert", "window_2", "skip_2_0_1")  # padded steps, and cells that are not read


def kept_cells(batch: int, cells: int, count: int, seed: int = 0) -> torch.Tensor:
    """Return `count` of the cells, of each image others, rising."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    return ranks[:, :count].sort(dim=1).values


def steps(orders, height: int, width: int, kept: torch.Tensor) -> dict:
    inverses = torch.stack([scans.order(name, height, width).inverse for name in orders])
    return dict(zip(("cells", "gaps"), scans.kept_steps(inverses, kept), strict=True))


def tokens_of(arguments: dict, kept: torch.Tensor) -> dict:
    """Return the arguments with the kept cells of maps as a map of one row."""
    image = torch.arange(len(kept))[:, None]
    taken = {
        name: arguments[name].detach().flatten(1, 2)[image, kept].unsqueeze(1) for name in ("x", "delta", "B", "C")
    }
    return {name: taken.get(name, x).detach().requires_grad_() for name, x in arguments.items()}


def check(arguments, softplus=True, **options):
    twins = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    actual = call_2d(selective_scan_2d, arguments, delta_softplus=softplus, **options)
    expected = call_2d(definition.selective_scan_2d, twins, delta_softplus=softplus, **options)
    assert actual.dtype == arguments["x"].dtype
    factor = 1.0 if arguments["x"].shape[-1] > 1 else 10.0  # the sums of one channel may cancel
    assert_close(actual, expected, factor=factor)
    ours, theirs = gradients(actual, list(arguments.values())), gradients(expected, list(twins.values()))
    assert_gradients_close(ours, theirs, factor=factor)


@settings(max_examples=40, deadline=None)
@given(
    sizes(2, 5, 5, 18, 5),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["sum", "mean", "none"]),
    st.sampled_from(["all", "input"]),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_cells_equal_definition(size, rank, merge, permute, softplus, share, dtype, choice, seed):
    batch, height, width, *_ = size
    orders = ORDERS if permute == "all" else ORDERS[:5]
    kept = kept_cells(batch, height * width, max(1, round(share * height * width)), seed)
    arguments = tokens_of(scan_2d_inputs(*size, orders, rank, seed, dtype), kept)
    if not softplus:  # steps that stay positive: the state decays
        small = {name: arguments[name].detach().abs() / 4 for name in ("delta", "weight") if name in arguments}
        arguments |= {name: x.requires_grad_() for name, x in small.items()}
    with choose(choice):
        check(arguments, softplus, merge=merge, permute=permute, **steps(orders, height, width, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_it_is_the_scan_of_the_whole_map_with_zeros(softplus, dtype):
    arguments = scan_2d_inputs(2, 5, 7, 17, 3, ORDERS, 2, dtype=dtype)
    kept = kept_cells(2, 35, 13)
    image, left = torch.arange(2)[:, None], torch.zeros(2, 35, dtype=dtype)
    left[image, kept] = 1
    whole = dict(arguments)
    for name in ("x", "delta", "B", "C"):
        whole[name] = arguments[name] * left.view(2, 5, 7, *[1] * (arguments[name].dim() - 3))
    expected = call_2d(selective_scan_2d, whole, orders=ORDERS, delta_softplus=softplus)
    tokens = tokens_of(arguments, kept)
    actual = call_2d(selective_scan_2d, tokens, delta_softplus=softplus, **steps(ORDERS, 5, 7, kept))
    assert_close(actual[:, 0], expected.flatten(1, 2)[image, kept])
    weights = torch.randn(actual.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    dense = torch.zeros(2, 35, 17, dtype=dtype)
    dense[image, kept] = weights[:, 0]
    parameters = ("A", "D", "delta_bias", "weight")
    ours = torch.autograd.grad(actual, [tokens[name] for name in parameters], weights)
    theirs = torch.autograd.grad(expected, [arguments[name] for name in parameters], dense.view(2, 5, 7, 17))
    assert_gradients_close(ours, theirs)


@pytest.mark.parametrize("choice", ["reference", "auto"])
@pytest.mark.parametrize("permute", ["all", "input"])
def test_all_cells_are_the_named_orders(choice, permute):
    arguments = scan_2d_inputs(2, 4, 6, 5, 2, CROSS, dtype=torch.float32)
    given = steps(CROSS, 4, 6, torch.arange(24).expand(2, -1))
    assert not given["gaps"].any()
    with use(choice):
        named = selective_scan_2d(**arguments, orders=CROSS, permute=permute, merge="none")
        ours = selective_scan_2d(**arguments, permute=permute, merge="none", **given)
    assert_close(ours, named)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    kept = kept_cells(2, 30, 11)
    arguments = tokens_of(scan_2d_inputs(2, 6, 5, 4, 2, CROSS, 2, dtype=dtype), kept)
    check(arguments, merge="mean", **steps(CROSS, 6, 5, kept))


def test_gradcheck():
    kept = kept_cells(1, 6, 4)
    arguments = tokens_of(scan_2d_inputs(1, 2, 3, 2, 2, CROSS[:2], 2), kept)
    given = steps(CROSS[:2], 2, 3, kept)

    def function(*tensors):
        return call_2d(selective_scan_2d, dict(zip(arguments, tensors, strict=True)), delta_softplus=True, **given)

    tensors = tuple(arguments.values())
    assert torch.autograd.gradcheck(function, tensors)
    with use("reference"):
        assert torch.autograd.gradgradcheck(function, tensors)


def test_opcheck():
    kept = kept_cells(2, 12, 5)
    a = tokens_of(scan_2d_inputs(2, 3, 4, 3, 2, CROSS, 2, dtype=torch.float32), kept)
    tensors = (a["x"], a["delta"], a["weight"], a["A"], a["B"], a["C"], a["D"], a["delta_bias"])
    options = (True, "", "sum", "all", True, "auto", None)
    given = steps(CROSS, 3, 4, kept)
    torch.library.opcheck(torch.ops.visionmix.selective_scan_2d.default, (*tensors, *options, *given.values()))


class Pruned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(4, 8, 2))
        self.bias = torch.nn.Parameter(torch.rand(4, 8))
        self.project = torch.nn.Linear(8, 4 * 12)

    def forward(self, x, kept):
        cells, gaps = scans.kept_steps(inverses(), kept)
        delta, B, C = self.project(x).unflatten(-1, (4, 12)).split([8, 2, 2], -1)
        options = (True, "", "sum", "all", None, cells, gaps)
        return selective_scan_2d_op(x, delta, None, self.A, B, C, None, self.bias, *options)


def inverses() -> torch.Tensor:
    return torch.stack([scans.order(name, 4, 5).inverse for name in CROSS])


def test_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x, kept = Pruned(), torch.randn(2, 1, 7, 8), kept_cells(2, 20, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for run in (compiled, model):
        out = run(x, kept)
        found = [out, *torch.autograd.grad(out.square().sum(), parameters)]
        if run is compiled:
            first = found
    for ours, theirs in zip(first, found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_and_operations():
    torch.manual_seed(0)
    model, x, kept = Pruned(), torch.randn(2, 1, 7, 8), kept_cells(2, 20, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, kept)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model(x, kept), rtol=0.05, atol=0.05)
    with FlopCounterMode(display=False) as counter:
        model(x, kept)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.visionmix.selective_scan_2d] == 2 * 7 * 8 * 4 * (7 * 2 + 2 + 2)


def test_bitwise_repeatable():
    kept = kept_cells(2, 63, 40)
    arguments = tokens_of(scan_2d_inputs(2, 7, 9, 20, 2, CROSS, 3, dtype=torch.float32), kept)
    given = steps(CROSS, 7, 9, kept)
    runs = [call_2d(selective_scan_2d, arguments, delta_softplus=True, **given) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, *(gradients(run, list(arguments.values())) for run in runs)))


@pytest.mark.parametrize("choice", CHOICES)
def test_empty_batch(choice):
    arguments = tokens_of(scan_2d_inputs(0, 3, 4, 3, 2, CROSS, dtype=torch.float32), kept_cells(0, 12, 5))
    with choose(choice):
        out = selective_scan_2d(**arguments, **steps(CROSS, 3, 4, kept_cells(0, 12, 5)))
        assert out.shape == (0, 1, 5, 3)
        assert not any(grad.any() for grad in gradients(out, list(arguments.values())))


def test_kept_steps_of_one_row():
    inverse = scans.order("raster", 1, 6).inverse, scans.order("raster_reversed", 1, 6).inverse
    cells, gaps = scans.kept_steps(torch.stack(inverse), torch.tensor([[1, 2, 5]]))
    assert cells.tolist() == [[[0, 1, 2], [2, 1, 0]]]
    assert gaps.tolist() == [[[1, 0, 2], [0, 2, 0]]]


CELLS = torch.zeros(2, 4, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gaps": CELLS}, ValueError, "gaps are those between the steps of cells=None"),
        ({"cells": CELLS, "orders": CROSS}, ValueError, "leave one of them out"),
        ({"cells": CELLS.float()}, TypeError, "cells has dtype torch.float32; pass a tensor of int32 or int64"),
        ({"cells": [[[0]]]}, TypeError, "cells is a list"),
        ({"cells": CELLS[:1]}, ValueError, r"cells has shape \(1, 4, 1\); it must be \(batch=2, K, steps\)"),
        ({"cells": CELLS.to("meta")}, ValueError, "cells is on meta, but x on cpu"),
        ({"cells": CELLS, "gaps": CELLS[..., :0]}, ValueError, r"gaps has shape \(2, 4, 0\)"),
        ({"cells": CELLS, "gaps": CELLS.expand(-1, -1, 2)}, ValueError, r"gaps has shape .*steps=1"),
        ({"cells": CELLS + 12}, ValueError, "cells has numbers from 12 to 12; those of a 3x4 map go from 0 to 11"),
        ({"cells": CELLS.expand(-1, -1, 2)}, ValueError, "cells has a cell twice in one order"),
        ({"cells": CELLS, "gaps": CELLS - 1}, ValueError, "gaps has numbers down to -1"),
        ({"cells": CELLS[:, :3]}, ValueError, r"A has shape .*K=3"),
        ({"cells": torch.arange(13).expand(2, 4, -1), "permute": "input"}, ValueError, "12 cells at most.*13"),
    ],
)
def test_bad_cells(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan_2d(**(scan_2d_inputs(dtype=torch.float32) | changes))
