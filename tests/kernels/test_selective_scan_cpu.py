"""The compiled selective scans against their definitions in float64: outputs and every gradient."""

import math

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import backends, selective_scan, selective_scan_2d, use
from visionmix.kernels.selective_scan import definition, reference
from visionmix.kernels.selective_scan.schema import Arguments
from visionmix.kernels.selective_scan_2d import definition as definition_2d

CROSS = ("raster", "raster_transposed", "raster_reversed", "raster_transposed_reversed")
ORDERS = {
    "cross": CROSS,
    "windows": ("raster", "column", "window_2", "window_3_reversed"),  # padded steps, unequal lengths
    "skip": ("skip_2_0_0", "skip_2_0_1_transposed", "skip_2_0_1", "skip_2_1_1_transposed"),  # each cell in one order
    "joined": ("raster_reversed+raster_transposed+raster_transposed_reversed", "snake"),  # a cell read three times
    "unswapped": ("column_unswapped", "raster"),  # the inverse is not that of the index
}


@pytest.fixture(autouse=True)
def compiled():
    if (reason := backends()["selective_scan"]["cpu"]) != "ready":
        pytest.skip(reason)
    with use("cpu"):
        yield


def make(batch, dim, length, states, B="1", C="1", options="D z delta_bias", seed=0, dtype=torch.float32):
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
        "delta_bias": random(dim).abs(),
    }
    names = ["u", "delta", "A", "B", "C", *options.split()]
    return {name: arguments[name].to(dtype).requires_grad_() for name in names}


def make_2d(batch, height, width, channels, states, orders=CROSS, rank=None, seed=0, dtype=torch.float32):
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
        "delta_bias": random(count, channels),
    }
    if rank:
        arguments["weight"] = random(count, channels, rank)
    return {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}


def call_2d(function, arguments, **options):
    arguments = dict(arguments)
    if "weight" in arguments:
        arguments["delta"] = (arguments["delta"], arguments.pop("weight"))
    return function(**arguments, delta_softplus=True, **options)


def doubles(arguments):
    return {name: x.detach().double().requires_grad_() for name, x in arguments.items()}


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
    actual, expected = call_2d(selective_scan_2d, arguments, **options), call_2d(_naive_2d, twins, **options)
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, list(arguments.values())), gradients(expected, list(twins.values())))


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
    arguments = make_2d(batch, height, width, channels, states, ORDERS[orders], rank, seed)
    check_2d(arguments, orders=ORDERS[orders], merge=merge)


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
    orders = ("raster+raster_transposed", "window_2_reversed")
    arguments = make_2d(1, 24, 23, 240, 33, orders)
    twins = doubles(arguments)
    with use("auto"):  # float64 takes the reference
        expected = call_2d(selective_scan_2d, twins, orders=orders)
        expected_grads = gradients(expected, list(twins.values()))
    actual = call_2d(selective_scan_2d, arguments, orders=orders)
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


def _same(function, arguments, copies):
    actual, expected = function(**arguments, delta_softplus=True), function(**copies, delta_softplus=True)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    assert all(
        map(torch.equal, gradients(actual, list(arguments.values())), gradients(expected, list(copies.values())))
    )


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
    copies = {name: x.clone(memory_format=torch.contiguous_format).requires_grad_() for name, x in arguments.items()}
    _same(selective_scan, {name: x.requires_grad_() for name, x in arguments.items()}, copies)


def test_2d_strides():
    arguments = {name: x.detach() for name, x in make_2d(2, 5, 4, 20, 2).items()}
    arguments["x"] = torch.randn(2, 20, 5, 4).permute(0, 2, 3, 1)
    arguments["delta"] = torch.randn(2, 5, 4, 1, 20).expand(-1, -1, -1, 4, -1)
    arguments["B"] = torch.randn(2, 5, 4, 4, 7)[..., 3:5]
    arguments["C"] = torch.randn(2, 5, 9, 4, 2)[:, :, 3:7]
    copies = {name: x.clone(memory_format=torch.contiguous_format).requires_grad_() for name, x in arguments.items()}
    _same(selective_scan_2d, {name: x.requires_grad_() for name, x in arguments.items()}, copies)


def test_same_bits_with_any_number_of_threads():
    arguments, maps = make(2, 80, 130, 16), make_2d(2, 9, 8, 80, 2, rank=3)
    runs = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            out, out_2d = selective_scan(**arguments), call_2d(selective_scan_2d, maps)
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
    out = call_2d(selective_scan_2d, maps)
    assert [g.shape for g in gradients(out, list(maps.values()))] == [x.shape for x in maps.values()]
