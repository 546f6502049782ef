"""`out_dtype`: outputs of half-precision inputs in float32, on every path and in every graph, with their gradients."""

import pytest
import torch
from choices import EACH_CHOICE, choose
from tolerance import TOLERANCE, assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels import bidirectional_gated_linear_attention, selective_scan, selective_scan_2d
from visionmix.kernels.gated_linear_attention import bidirectional_op
from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.kernels.selective_scan_2d import selective_scan_2d_op

ORDERS = ("raster", "raster_reversed+snake")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def _random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _scan(scale: float) -> dict[str, torch.Tensor]:
    return {
        "u": _random(2, 4, 19, scale=scale),
        "delta": _random(2, 4, 19).abs(),
        "A": -_random(4, 3).abs(),
        "B": _random(2, 1, 3, 19, scale=scale),
        "C": _random(2, 1, 3, 19, scale=scale),
        "D": _random(4),
    }


def _scan_2d(scale: float) -> dict[str, torch.Tensor]:
    return {
        "x": _random(2, 3, 5, 4, scale=scale),
        "delta": _random(2, 3, 5, 2, 4).abs(),
        "A": -_random(2, 4, 3).abs(),
        "B": _random(2, 3, 5, 2, 3, scale=scale),
        "C": _random(2, 3, 5, 2, 3, scale=scale),
        "D": _random(2, 4),
    }


def _attention(scale: float) -> dict[str, torch.Tensor]:
    tokens = (2, 19, 2)
    tensors = {"q": _random(*tokens, 3, scale=scale), "k": _random(*tokens, 5, scale=scale)[..., :3]}
    tensors["v"] = _random(*tokens, 4, scale=scale)
    return tensors | {name: -_random(*tokens, 3).abs() for name in ("g_forward", "g_backward")}


# Under autocast these come in float32: a scan's parameters, and gates that a float32 bias was added to.
_FULL = ("A", "D", "g_forward", "g_backward")
CASES = {
    "selective_scan": (selective_scan, _scan, {}),
    "selective_scan_2d": (selective_scan_2d, _scan_2d, {"orders": ORDERS, "merge": "mean"}),
    "selective_scan_2d, routes": (selective_scan_2d, _scan_2d, {"orders": ORDERS, "merge": "none"}),
    "bidirectional": (bidirectional_gated_linear_attention, _attention, {}),
}
EACH_CASE = pytest.mark.parametrize("case", CASES)


def _inputs(case: str, dtype: torch.dtype, scale: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the arguments in half precision, some in float32, and the same values in float64."""
    _, make, _ = CASES[case]
    halves = {name: x.to(torch.float32 if name in _FULL else dtype) for name, x in make(scale).items()}
    doubles = {name: x.double().requires_grad_() for name, x in halves.items()}
    return {name: x.requires_grad_() for name, x in halves.items()}, doubles


@EACH_CHOICE
@HALVES
@EACH_CASE
def test_output_in_float32(case, dtype, choice):
    op, _, options = CASES[case]
    halves, doubles = _inputs(case, dtype, 1.0)
    with choose(choice):
        out = op(**halves, **options, out_dtype=torch.float32)
        assert out.dtype == torch.float32
        assert op(**halves, **options).dtype == dtype
    assert_close(out, op(**doubles, **options))


@EACH_CHOICE
@EACH_CASE
def test_output_beyond_float16(case, choice):
    op, _, options = CASES[case]
    halves, doubles = _inputs(case, torch.float16, 300.0)
    with choose(choice):
        assert not op(**halves, **options).isfinite().all()
        assert_close(op(**halves, **options, out_dtype=torch.float32), op(**doubles, **options))


@EACH_CHOICE
@EACH_CASE
def test_gradients_take_no_detour_through_half_precision(case, choice):
    """A gradient of 1e-9 is zero in float16, and one of 1e6 infinite; a float32 input's gradient shows both."""
    op, _, options = CASES[case]
    for scale in (1e-9, 1e6):
        halves, doubles = _inputs(case, torch.float16, 1.0)
        names = [name for name in halves if name in _FULL]
        expected = op(**doubles, **options)
        weight = scale * _random(*expected.shape)
        with choose(choice):
            out = op(**halves, **options, out_dtype=torch.float32)
            grads = torch.autograd.grad(out, [halves[name] for name in names], weight.float())
        expected_grads = torch.autograd.grad(expected, [doubles[name] for name in names], weight)
        for name, ours, theirs in zip(names, grads, expected_grads, strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, name)


@EACH_CHOICE
@HALVES
@EACH_CASE
def test_gradients_have_the_types_of_their_inputs(case, dtype, choice):
    op, _, options = CASES[case]
    halves, doubles = _inputs(case, dtype, 1.0)
    weight = _random(*op(**doubles, **options).shape)
    with choose(choice):
        out = op(**halves, **options, out_dtype=torch.float32)
        grads = torch.autograd.grad(out, list(halves.values()), weight.float())
    expected = torch.autograd.grad(op(**doubles, **options), list(doubles.values()), weight)
    for (name, x), ours, theirs in zip(halves.items(), grads, expected, strict=True):
        assert ours.dtype == x.dtype
        assert_close(ours, theirs, name)


class Scan(nn.Module):
    def forward(self, u, delta, A, B, C, D):
        return selective_scan_op(u, delta, A, B, C, D, None, None, True, False, None, torch.float32)[0]


class CrossScan(nn.Module):
    def forward(self, x, delta, A, B, C, D):
        names = "raster,raster_reversed+snake"
        return selective_scan_2d_op(x, delta, None, A, B, C, D, None, True, names, "sum", "all", torch.float32)


class BothWays(nn.Module):
    def forward(self, q, k, v, g_forward, g_backward):
        return bidirectional_op(q, k, v, g_forward, g_backward, 0.5, "mean", torch.float32)


GRAPHS = pytest.mark.parametrize(
    ("module", "case"),
    [(Scan, "selective_scan"), (CrossScan, "selective_scan_2d"), (BothWays, "bidirectional")],
    ids=["scan", "scan_2d", "bidirectional"],
)


@GRAPHS
def test_graphs(module, case):
    """Scripted, traced by fx, exported and compiled as one graph."""
    model = module()
    halves = [x.detach() for x in _inputs(case, torch.bfloat16, 1.0)[0].values()]
    expected = model(*halves)
    assert expected.dtype == torch.float32
    program = torch.export.export(model, tuple(halves)).module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for graph in (torch.jit.script(model), torch.fx.symbolic_trace(model), program, compiled):
        assert torch.equal(graph(*halves), expected)
        assert graph(*halves).dtype == torch.float32
    with FlopCounterMode(display=False) as counter, FlopCounterMode(display=False) as other:
        model(*halves)
    assert counter.get_total_flops() == other.get_total_flops() > 0


@GRAPHS
def test_opcheck(module, case):
    inputs = list(_inputs(case, torch.bfloat16, 1.0)[0].values())
    if module is Scan:
        op, arguments = torch.ops.visionmix.selective_scan, (*inputs, None, None, True, False)
    elif module is CrossScan:
        op, arguments = torch.ops.visionmix.selective_scan_2d, (*inputs[:2], None, *inputs[2:], None, True)
        arguments = (*arguments, ",".join(ORDERS), "sum", "all")
    else:
        op, arguments = torch.ops.visionmix.bidirectional_gated_linear_attention, (*inputs, 0.5, "mean")
    tolerance = TOLERANCE[torch.bfloat16]
    torch.library.opcheck(op, arguments, {"out_dtype": torch.float32}, rtol=tolerance, atol=tolerance)


@EACH_CASE
def test_bad_out_dtype(case):
    op, _, options = CASES[case]
    halves, _ = _inputs(case, torch.float16, 1.0)
    with pytest.raises(TypeError, match=r"out_dtype='float32' is a str; pass a torch.dtype, as torch.float32, or None"):
        op(**halves, **options, out_dtype="float32")
    with pytest.raises(ValueError, match=r"out_dtype=torch.int32 is not a real floating-point type; pass"):
        op(**halves, **options, out_dtype=torch.int32)
