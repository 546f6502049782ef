import importlib

import pytest
import torch
from choices import CHOICES, choose
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scans import CROSS, ORDERS, assert_strides_are_read, call_2d, scan_2d_inputs
from strategies import sizes
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix import scans
from visionmix.kernels import dispatch, selective_scan_2d, use
from visionmix.kernels.selective_scan_2d import definition, reference, selective_scan_2d_op
from visionmix.kernels.selective_scan_2d.schema import Arguments, Gradients

PLAIN = ("snake", "snake_transposed", "raster_reversed", "hilbert")


def check(arguments, twins=None, **options):
    twins = arguments if twins is None else twins
    actual, expected = (
        call_2d(selective_scan_2d, arguments, **options),
        call_2d(definition.selective_scan_2d, twins, **options),
    )
    assert actual.dtype == arguments["x"].dtype
    assert_close(actual, expected)
    inputs = list(arguments.values())
    assert_gradients_close(gradients(actual, inputs), gradients(expected, list(twins.values())))


@settings(max_examples=30, deadline=None)
@given(
    sizes(2, 5, 5, 3, 3),
    st.sampled_from(sorted(ORDERS)),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["sum", "mean", "none"]),
    st.booleans(),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_selective_scan_2d_equals_definition(size, orders, rank, merge, softplus, choice, seed):
    orders = ORDERS[orders]
    arguments = scan_2d_inputs(*size, orders, rank, seed)
    with choose(choice):
        check(arguments, orders=orders, merge=merge, delta_softplus=softplus)


@pytest.mark.parametrize("merge", ["sum", "none"])
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_every_set_of_orders(orders, merge):
    check(scan_2d_inputs(orders=orders), orders=orders, merge=merge, delta_softplus=True)


@settings(max_examples=25, deadline=None)
@given(
    sizes(5, 5, 3),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["sum", "mean", "none"]),
    st.booleans(),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_input_alone_permuted(size, rank, merge, softplus, choice, seed):
    height, width, states = size
    arguments = scan_2d_inputs(2, height, width, 3, states, PLAIN, rank, seed)
    with choose(choice):
        check(arguments, orders=PLAIN, merge=merge, delta_softplus=softplus, permute="input")


def test_input_alone_permuted_is_the_scan_of_permuted_maps():
    """Steps read x in the order, the rest as it lies: the scan in raster order of x permuted beforehand, undone."""
    arguments = scan_2d_inputs(1, 4, 5, 3, 2, ("snake_transposed",), seed=1)
    index, inverse = scans.order("snake_transposed", 4, 5)
    permuted = arguments | {"x": arguments["x"].flatten(1, 2)[:, index].unflatten(1, (4, 5))}
    expected = selective_scan_2d(**permuted, orders=("raster",)).flatten(1, 2)[:, inverse].unflatten(1, (4, 5))
    actual = selective_scan_2d(**arguments, orders=("snake_transposed",), permute="input")
    assert_close(actual, expected)
    both = selective_scan_2d(**arguments, orders=("snake_transposed",))
    assert not torch.isclose(actual, both).flatten()[3:].any()


def test_input_alone_permuted_leaves_triton(caplog):
    """The Triton kernels have no such tables: the reference runs in their place, and the log says so."""
    pytest.importorskip("triton")
    module = importlib.import_module("visionmix.kernels.selective_scan_2d.triton")
    dispatch.log_slow_path.cache_clear()
    arguments = [x.detach() for x in scan_2d_inputs(orders=PLAIN).values()]
    arguments = Arguments(*arguments[:2], None, *arguments[2:], True, ",".join(PLAIN), "sum", "input")
    assert torch.equal(module.forward(arguments)[0], reference.forward(arguments)[0])
    given = Gradients(torch.randn_like(arguments.x), None)
    assert all(map(torch.equal, module.backward(arguments, given), reference.backward(arguments, given)))
    assert [record.getMessage().count("raster order") for record in caplog.records] == [1]


def test_default_is_the_cross_scan():
    arguments = scan_2d_inputs()
    assert torch.equal(selective_scan_2d(**arguments), selective_scan_2d(**arguments, orders=CROSS, merge="sum"))


def test_padded_steps_decay_the_state():
    """In windows of 2, a 1 x 3 grid has two padded steps before its third cell: they are not skipped."""
    arguments = scan_2d_inputs(1, 1, 3, 1, 1, ("window_2",))
    check(arguments, orders=("window_2",), merge="sum", delta_softplus=True)
    padded = selective_scan_2d(**arguments, orders=("window_2",), delta_softplus=True)
    unpadded = selective_scan_2d(**arguments, orders=("raster",), delta_softplus=True)
    assert torch.equal(padded[:, :, :2], unpadded[:, :, :2])
    assert not torch.isclose(padded[:, :, 2], unpadded[:, :, 2]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_selective_scan_2d(dtype):
    arguments = scan_2d_inputs(2, 6, 5, 4, 2, rank=2, dtype=dtype)
    twins = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    check(arguments, twins, orders=CROSS, merge="mean", delta_softplus=True)


def test_strides_of_selective_scan_2d():
    arguments = {name: x.detach() for name, x in scan_2d_inputs().items()}
    arguments["x"] = torch.randn(2, 3, 3, 4, dtype=torch.float64).permute(0, 2, 3, 1)
    arguments["delta"] = torch.randn(2, 3, 4, 1, 3, dtype=torch.float64).expand(-1, -1, -1, 4, -1)
    arguments["A"] = -torch.rand(2, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    arguments["B"] = torch.randn(2, 3, 4, 4, 7, dtype=torch.float64)[..., 3:5]
    assert_strides_are_read(selective_scan_2d, arguments)


def test_bitwise_repeatable_of_selective_scan_2d():
    arguments = scan_2d_inputs(2, 7, 9, 8, 2, dtype=torch.float32)
    runs = [selective_scan_2d(**arguments, delta_softplus=True) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, *(gradients(run, list(arguments.values())) for run in runs)))


@pytest.mark.parametrize("merge", ["sum", "none"])
def test_empty_batch_of_selective_scan_2d(merge):
    arguments = scan_2d_inputs(0)
    out = selective_scan_2d(**arguments, merge=merge)
    assert out.shape == ((0, 3, 4, 4, 3) if merge == "none" else (0, 3, 4, 3))
    inputs = list(arguments.values())
    assert [grad.shape for grad in gradients(out, inputs)] == [x.shape for x in inputs]


def test_tables_made_in_inference_mode_serve_training():
    arguments = scan_2d_inputs(1, 5, 3)
    with torch.inference_mode():
        selective_scan_2d(**{name: x.detach() for name, x in arguments.items()}, orders=CROSS)
    with use("reference"):
        gradients(selective_scan_2d(**arguments, orders=CROSS), list(arguments.values()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 4, 3, dtype=torch.int32)}, TypeError, r"x has dtype torch.int32"),
        ({"x": torch.ones(2, 12, 3)}, ValueError, r"x has shape \(2, 12, 3\); it must have 4 axes"),
        ({"x": torch.ones(2, 0, 4, 3)}, ValueError, r"x has shape \(2, 0, 4, 3\); every axis"),
        ({"A": torch.ones(3, 3, 2)}, ValueError, r"A has shape \(3, 3, 2\).*K=4"),
        ({"A": torch.ones(4, 3, 2, dtype=torch.cfloat)}, TypeError, r"A has dtype torch.complex64"),
        ({"B": torch.ones(2, 3, 4, 4, 1)}, ValueError, r"B has shape .*states=2"),
        ({"C": torch.ones(2, 4, 3, 4, 2)}, ValueError, r"C has shape .*height=3, width=4"),
        ({"D": torch.ones(12)}, ValueError, r"D has shape \(12,\); it must have 2 axes"),
        ({"delta": torch.ones(2, 3, 4, 4, 2)}, ValueError, r"delta has shape .*channels=3"),
        ({"delta": (torch.ones(2, 3, 4, 4, 2), torch.ones(4, 3, 1))}, ValueError, r"delta has shape .*rank=1"),
        ({"delta": (torch.ones(2, 3, 4, 4, 2), torch.ones(3, 4, 2))}, ValueError, r"delta_weight has shape"),
        ({"delta_bias": torch.ones(4, 3, device="meta")}, ValueError, r"delta_bias is on meta, but x on cpu"),
        ({"merge": "max"}, ValueError, r"merge='max' is unknown; choose one of 'sum', 'mean', 'none'"),
        ({"permute": "x"}, ValueError, r"permute='x' is unknown; choose one of 'all', 'input'"),
        (
            {"orders": ("raster", "window_2", "snake", "snake"), "permute": "input"},
            ValueError,
            r"permute='input'.*'window_2' has 16 steps on a 3x4 grid.*permute='all'",
        ),
        (
            {"orders": ("raster", "snake", "raster+snake", "snake"), "permute": "input"},
            ValueError,
            r"'raster\+snake' has 24 steps",
        ),
        ({"orders": "raster"}, TypeError, r"orders='raster' is not a sequence of names"),
        ({"orders": ()}, ValueError, r"orders is empty"),
        ({"orders": ("raster", "rastr", "snake", "snake")}, ValueError, r"'rastr'.*raster"),
    ],
)
def test_bad_inputs_of_selective_scan_2d(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan_2d(**(scan_2d_inputs(dtype=torch.float32) | changes))


def test_a_trace_under_the_reference_holds_operators_of_pytorch():
    x, delta = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 1, 5)
    A, B, C = -torch.rand(1, 5, 1), torch.randn(2, 3, 4, 1, 1), torch.randn(2, 3, 4, 1, 1)

    def scan(x):
        return selective_scan_2d_op(x, delta, None, A, B, C, None, None, True, "hilbert", "sum")

    with use("reference"):
        traced, other = torch.jit.trace(scan, x, check_trace=False), torch.randn_like(x)
        assert torch.allclose(traced(other), scan(other), atol=1e-6)
    assert "visionmix" not in str(traced.graph)
