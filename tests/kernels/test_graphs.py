"""Every fused op inside the graphs that PyTorch makes: script, fx, export, compile, ONNX, autograd's second order."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from profiled import by_reference_and_by_op
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels import use
from visionmix.kernels.gated_linear_attention import bidirectional_op, gated_linear_attention_op
from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.kernels.selective_scan_2d import selective_scan_2d_op
from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Attention(nn.Module):
    """(batch, length, 8) to (batch, length, 8), two heads."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.project(x).unflatten(-1, (2, 16)).chunk(4, -1)
        out, state = gated_linear_attention_op(q, k, v, F.logsigmoid(g), 0.5, None, True)
        return out.flatten(2) + state.mean()


class BothWays(nn.Module):
    """(batch, length, 8) to (batch, length, 8), two heads."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, a, b = self.project(x).unflatten(-1, (2, 20)).chunk(5, -1)
        return bidirectional_op(q, k, v, F.logsigmoid(a), F.logsigmoid(b), 0.5, "mean").flatten(2)


class Scan(nn.Module):
    """(batch, length, 8) to (batch, length, 8)."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8 + 8 + 2 + 2)
        self.A = nn.Parameter(-torch.rand(8, 2))
        self.D = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        u, delta, B, C = self.project(x).transpose(1, 2).split([8, 8, 2, 2], 1)
        out, _ = selective_scan_op(u, delta, self.A, B.unsqueeze(1), C.unsqueeze(1), self.D, u, None, True, False)
        return out.transpose(1, 2)


class CrossScan(nn.Module):
    """(batch, height, width, 8) to the same, with a delta of low rank."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 4 * (2 + 1 + 1))
        self.weight = nn.Parameter(torch.rand(4, 8, 2))
        self.A = nn.Parameter(-torch.rand(4, 8, 1))
        self.orders = "raster,raster_transposed,raster_reversed,raster_transposed_reversed"

    def forward(self, x: Tensor) -> Tensor:
        delta, B, C = self.project(x).unflatten(-1, (4, 4)).split([2, 1, 1], -1)
        return selective_scan_2d_op(x, delta, self.weight, self.A, B, C, None, None, True, self.orders, "sum")


MODULES = pytest.mark.parametrize("module", [Attention, BothWays, Scan, CrossScan])
NODES = {
    Attention: "visionmix.gated_linear_attention.default",
    BothWays: "visionmix.bidirectional_gated_linear_attention.default",
    Scan: "visionmix.selective_scan.default",
    CrossScan: "visionmix.selective_scan_2d.default",
}


def sample(module, size=(3, 5), batch=2):
    torch.manual_seed(sum(size))
    return torch.randn(batch, *size, 8) if module is CrossScan else torch.randn(batch, size[0] * size[1], 8)


def build(module):
    torch.manual_seed(0)
    return module()


def outputs_and_gradients(model, parameters, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), parameters)]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@MODULES
def test_script(module):
    model, x = build(module), sample(module)
    parameters = list(model.parameters())
    scripted = torch.jit.script(model)
    expected = outputs_and_gradients(model, parameters, x)
    for _ in range(3):  # the profiling executor optimises on the second and third call
        assert_same(outputs_and_gradients(scripted, parameters, x), expected)


@MODULES
def test_fx_and_script_of_fx(module):
    model, x = build(module), sample(module)
    traced = torch.fx.symbolic_trace(model)
    expected = outputs_and_gradients(model, list(model.parameters()), x)
    assert_same(outputs_and_gradients(traced, list(traced.parameters()), x), expected)
    assert_same([torch.jit.script(traced)(x)], expected[:1])


@MODULES
def test_trace(module):
    model, x = build(module), sample(module)
    traced = torch.jit.trace(model, x)
    other = sample(module, (4, 6), 1)
    assert_same([traced(other)], [model(other)])


@MODULES
def test_export_with_dynamic_sizes(module):
    model, x = build(module), sample(module)
    dynamic = dict.fromkeys(range(x.dim() - 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))
    assert NODES[module] in [str(node.target) for node in program.graph.nodes]
    for size, batch in (((3, 5), 2), ((6, 4), 3)):
        other = sample(module, size, batch)
        assert_same([program.module()(other)], [model(other)])


@MODULES
def test_compile_without_recompiles(module):
    model = build(module)
    parameters = list(model.parameters())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((3, 5), (6, 4), (9, 7)):
        x = sample(module, size)
        assert_same(outputs_and_gradients(compiled, parameters, x), outputs_and_gradients(model, parameters, x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.long
@MODULES
def test_compile_with_inductor(module):
    """Inductor checks the outputs' strides against the fakes'."""
    model = build(module)
    parameters = list(model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((3, 5), (6, 4), (9, 7)):
        x = sample(module, size)
        assert_same(outputs_and_gradients(compiled, parameters, x), outputs_and_gradients(model, parameters, x))
    torch._dynamo.reset()


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def op_cases(dtype=torch.float32, batch=2, length=7):
    """Ops with arguments, in the orders of their schemas, one case for each optional argument and more."""
    ops = torch.ops.visionmix

    def tokens(dim):
        return random(batch, length, 2, dim, dtype=dtype)

    def gate():
        return F.logsigmoid(tokens(3)).detach().requires_grad_()

    def make(*shape):
        return random(*shape, dtype=dtype)

    def rates(*shape):
        return (-torch.rand(*shape, dtype=dtype)).requires_grad_()

    q, k, v = tokens(3), tokens(3), tokens(4)
    u, delta, z = make(batch, 4, length), make(batch, 4, length), make(batch, 4, length)
    B, C, D, bias = make(batch, 2, 3, length), make(batch, 2, 3, length), make(4), make(4)
    grid = (batch, 2, 3)
    low_rank = (make(*grid, 2, 1), make(2, 4, 1))

    def scan_2d(delta, weight, D, bias, orders, merge, permute):
        maps = (make(*grid, 2, 2), make(*grid, 2, 2))
        arguments = (make(*grid, 4), delta, weight, rates(2, 4, 2), *maps, D, bias, True, orders, merge, permute)
        return ops.selective_scan_2d, arguments

    return {
        "attention": (ops.gated_linear_attention, (q, k, v, gate(), 0.5, None, False)),
        "attention_states": (ops.gated_linear_attention, (q, k, v, gate(), 0.5, make(batch, 2, 3, 4), True)),
        "bidirectional": (ops.bidirectional_gated_linear_attention, (q, k, v, gate(), gate(), 0.5, "mean")),
        "scan": (ops.selective_scan, (u, delta, rates(4, 3), B, C, D, z, bias, True, True)),
        "scan_bare": (ops.selective_scan, (u, delta, rates(4, 3), B, C, None, None, None, False, False)),
        "scan_constant": (ops.selective_scan, (u, delta, rates(4, 3), make(4, 3), C, None, None, None, False, False)),
        "scan_2d": scan_2d(make(*grid, 2, 4), None, make(2, 4), make(2, 4), "raster,window_2", "sum", "all"),
        "scan_2d_low_rank": scan_2d(*low_rank, None, None, "raster,window_2", "none", "all"),
        "scan_2d_input_permuted": scan_2d(
            *low_rank, make(2, 4), None, "raster_reversed,snake_transposed", "mean", "input"
        ),
    }


CASES = pytest.mark.parametrize("case", op_cases())


@CASES
def test_opcheck(case):
    op, arguments = op_cases()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op, arguments)


def differentiable(case, batch=1, length=5):
    """The op as a function of its tensors, in float64, and the tensors."""
    torch.manual_seed(0)
    op, arguments = op_cases(torch.float64, batch, length)[case]
    places = [number for number, x in enumerate(arguments) if isinstance(x, Tensor)]

    def function(*tensors):
        filled = list(arguments)
        for place, x in zip(places, tensors, strict=True):
            filled[place] = x
        out = op(*filled)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(x for x in outs if x.numel())

    return function, [arguments[place] for place in places]


# Along one direction drawn at random; entry by entry in the sweeps, as in the tests of the definitions.
EITHER_MODE = pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.long)])


@EITHER_MODE
@CASES
def test_gradcheck(case, fast_mode):
    function, tensors = differentiable(case)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=fast_mode)


@CASES
def test_double_backward_names_the_remedy(case):
    function, tensors = differentiable(case)
    (grad,) = torch.autograd.grad(function(*tensors)[0].square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'double backward is not implemented.*visionmix.kernels.use\("reference"\)'):
        grad.sum().backward()


@CASES
def test_vmap_names_the_remedy(case):
    function, tensors = differentiable(case)
    stacked = [torch.stack([x, x]) for x in tensors]
    with pytest.raises(RuntimeError, match=r'vmap is not implemented.*visionmix.kernels.use\("reference"\)'):
        torch.vmap(function)(*stacked)


@EITHER_MODE
@MODULES
def test_double_backward_under_reference(module, fast_mode):
    model, x = build(module).double(), sample(module, (2, 2), 1).double().requires_grad_()
    with use("reference"):
        assert torch.autograd.gradgradcheck(model, (x,), fast_mode=fast_mode)


@MODULES
def test_vmap_under_reference(module):
    model = build(module)
    x = torch.stack([sample(module), 2 * sample(module)])
    with use("reference"):
        assert_same([torch.vmap(model)(x)], [torch.stack([model(part) for part in x])])


@pytest.mark.parametrize(
    "module", [Scan, *(pytest.param(each, marks=pytest.mark.long) for each in (Attention, BothWays, CrossScan))]
)
def test_onnx_under_reference(module, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build(module).eval(), sample(module, (6, 7))
    to_onnx(model, x, tmp_path / "model.onnx")
    run, _ = open_file(tmp_path / "model.onnx")
    assert_same([run(x)], [model(x).detach()])
    # Tracing leaves no traced tensors behind in the tables of scan orders.
    assert_same(outputs_and_gradients(model, list(model.parameters()), x)[:1], [model(x)])


@MODULES
def test_reference_is_called_in_place_of_the_op(module):
    model, x = build(module), sample(module)
    parameters = list(model.parameters())
    assert_same(*by_reference_and_by_op(lambda: outputs_and_gradients(model, parameters, x)))


# Counted by hand: batch 2; attention 7 tokens, 2 heads, dk 3, dv 4; scan 4 channels, 3 states; 2D 6 cells, 2 orders.
FLOPS = {
    "attention": (5 * 2 * 7 * 2 * 12, 14 * 2 * 7 * 2 * 12),
    "attention_states": (5 * 2 * 7 * 2 * 12, 14 * 2 * 7 * 2 * 12),
    "bidirectional": (2 * 5 * 2 * 7 * 2 * 12, 2 * 14 * 2 * 7 * 2 * 12),
    "scan": (2 * 4 * 7 * (7 * 3 + 1 + 2 + 3), 2 * 4 * 7 * (19 * 3 + 4 + 4 + 7)),
    "scan_bare": (2 * 4 * 7 * (7 * 3 + 1), 2 * 4 * 7 * (19 * 3 + 4)),
    "scan_constant": (2 * 4 * 7 * (7 * 3 + 1), 2 * 4 * 7 * (19 * 3 + 4)),
    "scan_2d": (2 * 6 * 4 * 2 * (7 * 2 + 1 + 1 + 2), 2 * 6 * 4 * 2 * (19 * 2 + 5 + 4)),
    "scan_2d_low_rank": (2 * 6 * 4 * 2 * (7 * 2 + 1 + 1 + 2), 2 * 6 * 4 * 2 * (19 * 2 + 5 + 6)),
    "scan_2d_input_permuted": (2 * 6 * 4 * 2 * (7 * 2 + 1 + 1 + 2 + 2), 2 * 6 * 4 * 2 * (19 * 2 + 5 + 4 + 6)),
}


@CASES
def test_flops(case):
    op, arguments = op_cases()[case]
    with FlopCounterMode(display=False) as counter:
        out = op(*arguments)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    backward = getattr(torch.ops.visionmix, f"{op._qualified_op_name.split('::')[1]}_backward")
    assert (counts[op], counts[backward]) == FLOPS[case]
