"""The compiled selective scans against their definitions in float64: outputs and every gradient."""

import math
from functools import partial

import golden
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selective_scans import (
    CROSS,
    ORDERS,
    assert_strides_are_read,
    call_2d,
    compiled,  # noqa: F401
    doubles,
    scan_2d_inputs,
    scan_inputs,
)
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import selective_scan, selective_scan_2d, use
from visionmix.kernels.selective_scan import definition, reference
from visionmix.kernels.selective_scan.schema import Arguments
from visionmix.kernels.selective_scan_2d import definition as definition_2d

make = partial(scan_inputs, dtype=torch.float32)
make_2d = partial(scan_2d_inputs, dtype=torch.float32)


def scan_2d(arguments, **options):
    return call_2d(selective_scan_2d, arguments, delta_softplus=True, **options)


def check(arguments, softplus=True, last=False, expect=definition.selective_scan):
    twins = doubles(arguments)
    expected = expect(**twins, delta_softplus=softplus)
    actual = selective_scan(**arguments, delta_softplus=softplus, return_last_state=last)
    actual, expected = (actual, expected) if last else ((actual,), expected[:1])
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)
    assert_gradients_close(gradients(actual, list(arguments.values())), gradients(expected, list(twins.values())))


def check_2d(arguments, **options):
    twins = doubles(arguments)
    actual, expected = scan_2d(arguments, **options), call_2d(_naive_2d, twins, delta_softplus=True, **options)
    assert_close(actual, expected)
    # Gradients of one channel's D and bias are one number each, a sum over all cells that may come out near 0.
    factor = 1.0 if arguments["x"].shape[-1] > 1 else 10.0
    ours, theirs = gradients(actual, list(arguments.values())), gradients(expected, list(twins.values()))
    assert_gradients_close(ours, theirs, factor=factor)


def _naive_2d(*, orders=CROSS, merge="sum", **arguments):
    return definition_2d.selective_scan_2d(orders=orders, merge=merge, **arguments)


_META, _ARRAYS = golden.load("op_selective_scan")


@pytest.mark.parametrize("case", _META["cases"], ids=lambda case: f"case{case['case']}")
def test_golden(case):
    def read(name):
        return torch.from_numpy(_ARRAYS[f"case{case['case']}_{name}"])

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    names = [name for name in names if f"case{case['case']}_{name}" in _ARRAYS]
    arguments = {name: read(name).requires_grad_() for name in names}
    out, state = selective_scan(**arguments, delta_softplus=case["softplus"], return_last_state=True)
    assert_close(out, read("out"), "out")
    assert_close(state, read("last_state"), "last_state")
    grads = torch.autograd.grad((out * read("w")).sum(), list(arguments.values()))
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, read(f"d{name}"), f"d{name}")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3, 16, 17, 40]),
    st.integers(1, 2),
    st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100]),
    st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 20, 33]),
    st.sampled_from(["constant", "groups"]),
    st.sampled_from(["constant", "groups"]),
    st.sampled_from(["", "D", "z", "delta_bias", "D z delta_bias"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_against_definition(batch, channels, groups, length, states, B, C, options, softplus, last, seed):
    B, C = (x if x == "constant" else str(groups) for x in (B, C))
    check(make(batch, channels * groups, length, states, B, C, options, seed), softplus, last)


@pytest.mark.parametrize("op", ["selective_scan", "selective_scan_2d"])
def test_states_that_were_not_kept_are_found_again(op):
    if op == "selective_scan":
        arguments = make(2, 17, 70, 5)
        settings = (True, False, None)
    else:
        arguments = make_2d(2, 7, 9, 17, 2, rank=3)
        arguments = {name: arguments[name] for name in ("x", "delta", "weight", "A", "B", "C", "D", "delta_bias")}
        settings = (True, ",".join(CROSS), "sum", "all")
    tensors = list(arguments.values())
    found = [
        gradients(getattr(torch.ops.visionmix, op)(*tensors, *settings, keep)[0], tensors) for keep in (True, False)
    ]
    assert all(map(torch.equal, *found))


def test_gradients_of_the_last_state_alone():
    arguments = make(2, 5, 40, 3, options="delta_bias")
    twins = doubles(arguments)
    _, expected = definition.selective_scan(**twins, delta_softplus=True)
    _, actual = selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    names = ["u", "delta", "A", "B", "delta_bias"]  # the others do not reach it
    ours, theirs = ([inputs[name] for name in names] for inputs in (arguments, twins))
    assert_gradients_close(gradients(actual, ours), gradients(expected, theirs))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([3, 16, 17, 40]),
    st.sampled_from([2, 15, 16, 17, 64, 65, 100]),
    st.sampled_from([1, 3, 5, 16, 17]),
    st.sampled_from(["constant", "1"]),
    st.sampled_from(["", "D", "z", "D z delta_bias"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_gaps_against_definition(channels, length, states, B, options, last, seed):
    arguments = make(2, channels, length, states, B, B, options, seed)
    gap = torch.rand(2, length, channels, generator=torch.Generator().manual_seed(seed)).mT  # of other strides than u
    arguments["gap"] = (gap * (gap > 0.4)).requires_grad_()
    check(arguments, last=last)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3, 16, 17, 40]),
    st.sampled_from([1, 2, 5, 16, 17]),
    st.sampled_from(sorted(ORDERS)),
    st.sampled_from([None, 1, 3, 12, 17]),
    st.sampled_from(["sum", "mean", "none"]),
    st.integers(0, 9),
)
def test_2d_against_definition(batch, height, width, channels, states, orders, rank, merge, seed):
    # One cell's gradients of B and C are two sums or so over channels, which may all but cancel; test_2d_of_one_cell.
    assume(height * width > 3)
    arguments = make_2d(batch, height, width, channels, states, ORDERS[orders], rank, seed)
    check_2d(arguments, orders=ORDERS[orders], merge=merge)


@pytest.mark.parametrize("rank", [None, 3])
def test_2d_of_one_cell(rank):
    check_2d(make_2d(2, 1, 1, 17, 5, ORDERS["skip"], rank, 0), orders=ORDERS["skip"], merge="sum")


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 17, 40]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([None, 3, 17]),
    st.sampled_from(["sum", "mean", "none"]),
    st.integers(0, 9),
)
def test_2d_input_alone_permuted(height, width, channels, states, rank, merge, seed):
    orders = ("snake", "raster_transposed_reversed", "hilbert")
    arguments = make_2d(2, height, width, channels, states, orders, rank, seed)
    check_2d(arguments, orders=orders, merge=merge, permute="input")


def test_2d_orders_one_by_one():
    """The sums over channels of so large a map, 15 tiles and 2 x 33 features, are not kept for all orders at once."""
    orders = ("raster+raster_transposed", "window_2_reversed", "snake", "hilbert")
    arguments = make_2d(1, 24, 23, 240, 33, orders)
    twins = doubles(arguments)
    with use("auto"):  # float64 takes the reference
        expected = scan_2d(twins, orders=orders)
        expected_grads = gradients(expected, list(twins.values()))
    actual = scan_2d(arguments, orders=orders)
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, list(arguments.values())), expected_grads)


# The cases of mamba's own test of the op: variable B and C of one or two groups or constant ones, every option.
@pytest.mark.parametrize("length", [128, *(pytest.param(n, marks=pytest.mark.long) for n in (256, 512, 1024, 4096))])
@pytest.mark.parametrize("options", ["", "D z delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(("B", "C"), [("ungrouped", "ungrouped"), ("2", "2"), ("constant", "2"), ("constant",) * 2])
def test_published_cases(length, options, softplus, B, C):
    def expect(delta_softplus, **arguments):
        grouped = {name: x if x.dim() != 3 else x.unsqueeze(1) for name, x in arguments.items() if name in ("B", "C")}
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        tensors = [(arguments | grouped).get(name) for name in names]
        return reference.forward(Arguments(*tensors, delta_softplus, True))[:2]

    arguments = make(2, 4, length, 8, B, C, options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        arguments["A"].copy_(-0.5 * torch.rand(4, 8, generator=generator))
        arguments["delta"].copy_(0.5 * torch.rand(2, 4, length, generator=generator))
    check(arguments, softplus, last=True, expect=expect)


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 0.3])
def test_decay_errors_do_not_compound(rate):
    """One token's trace is the product of all decays since: rounded at random it errs by 3e-8 sqrt(t), biased by t."""
    length = 6000
    u = torch.zeros(1, 16, length)
    u[..., 0] = 1
    delta = rate * (0.5 + torch.rand(1, 16, length, generator=torch.Generator().manual_seed(0)))
    ones = torch.ones(1, 1, length)
    out = selective_scan(u, delta, -torch.ones(16, 1), ones, ones)
    steps = delta.double()
    expected = steps[..., :1] * torch.exp(steps[..., :1] - steps.cumsum(-1))
    error = (out.double() / expected - 1).abs()[expected > 1e-30].max().item()
    assert error < 2e-5


def test_long_sequence():
    arguments = make(1, 16, 5000, 16, options="D")
    with torch.no_grad():
        arguments["A"].mul_(0.05)
    twins = doubles(arguments)
    with use("auto"):  # float64 takes the reference
        expected = selective_scan(**twins, delta_softplus=True)
    actual = selective_scan(**arguments, delta_softplus=True)
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, list(arguments.values())), gradients(expected, list(twins.values())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    arguments = make(2, 20, 49, 4, "2", "2", dtype=dtype)
    twins = doubles(arguments)
    actual = selective_scan(**arguments, delta_softplus=True)
    expected, _ = definition.selective_scan(**twins, delta_softplus=True)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    grads = gradients(actual, list(arguments.values()))
    assert all(grad.dtype == dtype for grad in grads)
    assert_gradients_close(grads, gradients(expected, list(twins.values())))
    check_2d(make_2d(2, 6, 5, 20, 2, rank=2, dtype=dtype), merge="mean")


@pytest.mark.parametrize("dim", [32, 7])
def test_strides(dim):
    arguments = {name: x.detach() for name, x in make(2, dim, 70, 16).items()}
    arguments["u"] = torch.randn(2, 70, dim).transpose(1, 2)  # channels dense
    arguments["z"] = torch.randn(2, dim, 210)[..., ::3]  # neither dense
    arguments["delta"] = arguments["delta"][:, :1].expand(-1, dim, -1)
    arguments["A"] = -torch.rand(16, dim).t()
    arguments["B"] = torch.randn(2, 70, 20)[..., 2:18].transpose(1, 2).unsqueeze(1)
    arguments["C"] = torch.randn(2, 1, 16, 140)[..., ::2]
    arguments["D"] = torch.randn(2 * dim)[::2]
    assert_strides_are_read(selective_scan, arguments, delta_softplus=True)


def test_2d_strides():
    arguments = {name: x.detach() for name, x in make_2d(2, 5, 4, 20, 2).items()}
    arguments["x"] = torch.randn(2, 20, 5, 4).permute(0, 2, 3, 1)
    arguments["delta"] = torch.randn(2, 5, 4, 1, 20).expand(-1, -1, -1, 4, -1)
    arguments["B"] = torch.randn(2, 5, 4, 4, 7)[..., 3:5]
    arguments["C"] = torch.randn(2, 5, 9, 4, 2)[:, :, 3:7]
    assert_strides_are_read(selective_scan_2d, arguments, delta_softplus=True)


def test_same_bits_with_any_number_of_threads():
    arguments, maps = make(2, 80, 130, 16), make_2d(2, 9, 8, 80, 2, rank=3)
    runs = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            out, out_2d = selective_scan(**arguments), scan_2d(maps)
            runs.append(
                [out, *gradients(out, list(arguments.values())), out_2d, *gradients(out_2d, list(maps.values()))]
            )
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_extreme_steps():
    """A step of infinity forgets all; above 20 softplus is the identity; far below, steps keep relative accuracy."""
    u, ones = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    u[..., 0] = 1
    delta = torch.tensor([[[1.0, 30.0, 0.0]]])
    out = selective_scan(u, delta, torch.tensor([[-torch.inf]]), ones, ones)
    assert out[0, 0, 0] == 1
    assert out[0, 0, 1] == 0
    for raw in (-80.0, -15.0, -1e-3, 0.0, 3.0, 19.9, 20.1, 100.0):
        out = selective_scan(ones, torch.full((1, 1, 3), raw), -ones[0, :1, :1], ones, ones, delta_softplus=True)
        step = math.log1p(math.exp(raw)) if raw < 30 else raw
        assert abs(out[0, 0, 0].item() / step - 1) < 5e-7
    assert selective_scan(u * torch.nan, delta, -ones[0, :, :1], ones, ones).isnan().all()


def test_empty_batch():
    arguments = make(0, 4, 10, 3)
    out = selective_scan(**arguments)
    assert out.shape == (0, 4, 10)
    assert [g.shape for g in gradients(out, list(arguments.values()))] == [x.shape for x in arguments.values()]
    maps = make_2d(0, 3, 4, 5, 2)
    out = scan_2d(maps)
    assert [g.shape for g in gradients(out, list(maps.values()))] == [x.shape for x in maps.values()]
