"""The compiled selective scans of half precision: every result has the bits of that of float32 copies, rounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scans import CROSS, ORDERS, call_2d, compiled, scan_2d_inputs, scan_inputs  # noqa: F401
from tolerance import gradients

from visionmix import scans
from visionmix.kernels import selective_scan, selective_scan_2d

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MIXED = {"x": BFLOAT16, "u": BFLOAT16, "delta": FLOAT32, "B": FLOAT16, "C": BFLOAT16, "z": FLOAT16, "gap": BFLOAT16}
TYPES = [BFLOAT16, FLOAT16, MIXED]
EACH_TYPE = pytest.mark.parametrize("types", TYPES, ids=["bfloat16", "float16", "mixed"])
OUT_DTYPES = [None, FLOAT32, FLOAT16]


def rounded(arguments, types):
    """Return the arguments in their types, those that `types` does not name in float32."""
    chosen = types if isinstance(types, dict) else dict.fromkeys(arguments, types)
    return {name: x.detach().to(chosen.get(name, FLOAT32)).requires_grad_() for name, x in arguments.items()}


def check(function, arguments, out_dtype=None):
    """Hold `function` of the arguments to that of float32 copies; `function` returns one tensor."""
    copies = {name: x.detach().float().requires_grad_() for name, x in arguments.items()}
    actual, expected = function(arguments, out_dtype), function(copies, None)
    first = next(iter(arguments.values()))
    assert actual.dtype == (out_dtype or first.dtype)
    assert actual.is_contiguous()
    assert_same_bits(actual, expected.to(actual.dtype), "out")
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0)).to(actual.dtype)
    ours = torch.autograd.grad(actual, list(arguments.values()), weight)
    theirs = torch.autograd.grad(expected, list(copies.values()), weight.float())
    for (name, x), grad, other in zip(arguments.items(), ours, theirs, strict=True):
        assert grad.dtype == x.dtype
        assert_same_bits(grad, other.to(x.dtype), name)


def assert_same_bits(actual, expected, name):
    assert not expected.isnan().any(), name
    assert torch.equal(actual, expected), name


def scan(arguments, out_dtype, **options):
    return selective_scan(**arguments, delta_softplus=True, out_dtype=out_dtype, **options)


def scan_2d(**options):
    return lambda arguments, out_dtype: call_2d(
        selective_scan_2d, arguments, delta_softplus=True, out_dtype=out_dtype, **options
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.sampled_from([1, 3, 16, 17, 40]),
    st.sampled_from([1, 15, 16, 17, 64, 65, 100]),
    st.sampled_from([1, 2, 7, 16, 17, 20]),
    st.sampled_from(["constant", "1"]),
    st.sampled_from(["constant", "1"]),
    st.sampled_from(["", "D", "z", "D z delta_bias"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(OUT_DTYPES),
    st.integers(0, 9),
)
def test_selective_scan(types, channels, length, states, B, C, options, gap, channels_dense, out_dtype, seed):
    arguments = scan_inputs(2, channels, length, states, B, C, options, seed, FLOAT32)
    if gap:
        arguments["gap"] = torch.rand(2, channels, length, generator=torch.Generator().manual_seed(seed))
    arguments = rounded(arguments, types)
    if channels_dense:
        arguments = {
            name: x.detach().mT.contiguous().mT.requires_grad_() if x.dim() > 2 else x for name, x in arguments.items()
        }
    check(scan, arguments, out_dtype)


@EACH_TYPE
@pytest.mark.parametrize("channels", [7, 32])
def test_strides_of_selective_scan(types, channels):
    bases = scan_inputs(2, channels, 70, 16, dtype=FLOAT32) | {
        "u": torch.randn(2, channels, 210),
        "delta": torch.rand(2, 1, 70),
        "B": torch.randn(2, 70, 20),
        "C": torch.randn(2, 1, 16, 140),
        "gap": torch.rand(2, 70, channels),
    }
    arguments = rounded(bases, types)
    arguments["u"] = arguments["u"][..., ::3]  # no axis dense
    arguments["delta"] = arguments["delta"].expand(-1, channels, -1)
    arguments["B"] = arguments["B"][..., 2:18].mT.unsqueeze(1)
    arguments["C"] = arguments["C"][..., ::2]
    arguments["gap"] = arguments["gap"].mT
    check(scan, arguments)


@EACH_TYPE
def test_last_state(types):
    arguments = rounded(scan_inputs(2, 17, 70, 5, dtype=FLOAT32), types)
    copies = {name: x.detach().float() for name, x in arguments.items()}
    out, state = scan(arguments, None, return_last_state=True)
    expected, expected_state = scan(copies, None, return_last_state=True)
    assert torch.equal(out, expected.to(out.dtype))
    assert torch.equal(state, expected_state.to(state.dtype))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.sampled_from([1, 3, 16, 17, 40]),
    st.sampled_from([(1, 1), (3, 4), (9, 8)]),
    st.sampled_from([1, 2, 17]),
    st.sampled_from(sorted(ORDERS)),
    st.sampled_from([None, 1, 6]),
    st.sampled_from(["sum", "mean", "none"]),
    st.sampled_from(OUT_DTYPES),
    st.integers(0, 9),
)
def test_selective_scan_2d(types, channels, grid, states, orders, rank, merge, out_dtype, seed):
    orders = ORDERS[orders]
    arguments = rounded(scan_2d_inputs(2, *grid, channels, states, orders, rank, seed, FLOAT32), types)
    check(scan_2d(orders=orders, merge=merge), arguments, out_dtype)


@EACH_TYPE
@pytest.mark.parametrize("rank", [None, 3])
def test_input_alone_permuted(types, rank):
    orders = ("snake", "snake_transposed", "hilbert")
    arguments = rounded(scan_2d_inputs(2, 5, 7, 17, 3, orders, rank, dtype=FLOAT32), types)
    check(scan_2d(orders=orders, permute="input"), arguments)


@EACH_TYPE
@pytest.mark.parametrize("merge", ["mean", "none"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("channels", [1, 17])
def test_cells_given(types, merge, rank, channels):
    """Not every cell is read, padded steps stand at the ends, and gaps decay the state."""
    orders = (*CROSS, "window_2")
    arguments = rounded(scan_2d_inputs(2, 1, 13, channels, 3, orders, rank, dtype=FLOAT32), types)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 35, generator=generator).argsort(dim=1)[:, :13].sort(dim=1).values
    cells, gaps = scans.kept_steps(torch.stack([scans.order(name, 5, 7).inverse for name in orders]), kept)
    check(scan_2d(cells=cells, gaps=gaps, merge=merge), arguments)
    unread = cells.masked_fill(cells == 6, -1)
    check(scan_2d(cells=unread, gaps=gaps, merge=merge), arguments)


@EACH_TYPE
def test_strides_of_selective_scan_2d(types):
    bases = scan_2d_inputs(2, 5, 4, 20, 2, dtype=FLOAT32) | {
        "x": torch.randn(2, 20, 5, 4),
        "delta": torch.randn(2, 5, 4, 1, 20),
        "B": torch.randn(2, 5, 4, 4, 7),
        "C": torch.randn(2, 5, 9, 4, 2),
    }
    arguments = rounded(bases, types)
    arguments["x"] = arguments["x"].permute(0, 2, 3, 1)
    arguments["delta"] = arguments["delta"].expand(-1, -1, -1, 4, -1)
    arguments["B"] = arguments["B"][..., 3:5]
    arguments["C"] = arguments["C"][:, :, 3:7]
    check(scan_2d(orders=CROSS), arguments)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
def test_orders_one_by_one(dtype, rank):
    """The sums over channels of so large a map are not kept for all orders at once; x's gradient adds up over them."""
    orders = ("raster+raster_transposed", "window_2_reversed", "snake", "hilbert")
    arguments = rounded(scan_2d_inputs(1, 24, 23, 240, 33, orders, rank, dtype=FLOAT32), dtype)
    check(scan_2d(orders=orders), arguments)


@EACH_TYPE
def test_any_number_of_threads(types):
    arguments = rounded(scan_2d_inputs(2, 9, 8, 80, 2, rank=3, dtype=FLOAT32), types)
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = scan_2d(orders=CROSS)(arguments, None)
        runs.append([out, *gradients(out, list(arguments.values()))])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_what_half_precision_cannot_hold(dtype):
    """Sums beyond the range are infinite once rounded; between orders they are not."""
    arguments = scan_2d_inputs(1, 3, 4, 17, 1, ("raster", "snake"), dtype=FLOAT32)
    arguments["x"] = arguments["x"].detach().clamp(-1, 1) * 60000
    arguments["D"] = torch.tensor([[1.0], [-0.5]]).expand(2, 17)
    arguments["C"] = arguments["C"].detach() * 1e-3
    check(scan_2d(orders=("raster", "snake")), rounded(arguments, dtype))
    arguments["D"] = arguments["D"].abs() * 2
    out = scan_2d(orders=("raster", "snake"))(rounded(arguments, dtype), None)
    assert out.isinf().any() == (dtype == FLOAT16)


def test_types_that_kernels_do_not_write():
    arguments = rounded(scan_2d_inputs(1, 3, 4, 17, 2, dtype=FLOAT32), BFLOAT16)
    out = scan_2d(orders=CROSS)(arguments, torch.float64)
    assert torch.equal(out, scan_2d(orders=CROSS)(arguments, FLOAT32).double())
    arguments = rounded(scan_inputs(1, 17, 20, dtype=FLOAT32), BFLOAT16)
    assert torch.equal(scan(arguments, torch.float64), scan(arguments, FLOAT32).double())
