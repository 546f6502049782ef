"""Neighborhood attention inside the graphs that PyTorch makes: script, fx, export, compile, ONNX, second order."""

import warnings

import pytest
import torch
from profiled import by_reference_and_by_op
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels import na2d, use
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.kernels.neighborhood_attention.windows import count_pairs
from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NODE = "visionmix.neighborhood_attention.default"
OP = torch.ops.visionmix.neighborhood_attention
BACKWARD = torch.ops.visionmix.neighborhood_attention_backward


class Attention(nn.Module):
    """(batch, height, width, 8) to the same, two heads, with position bias and a token that all attend to."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.token = nn.Parameter(torch.randn(1, 1, 2, 4))
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
        token = self.token.expand(x.shape[0], -1, -1, -1)
        out, lse = neighborhood_attention_op(
            q, k, v, [3, 3], [1, 1], [2, 1], [0, 0], 0.5, token, token, self.bias, False
        )
        return out.flatten(-2) + lse.mean()


class Checked(Attention):
    """The same through the checked function, which compiles and exports too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
        token = self.token.expand(x.shape[0], -1, -1, -1)
        out, lse = na2d(
            q,
            k,
            v,
            3,
            dilation=(2, 1),
            scale=0.5,
            additional_keys=token,
            additional_values=token,
            relative_position_bias=self.bias,
            return_lse=True,
        )
        return out.flatten(-2) + lse.mean()


EITHER = pytest.mark.parametrize("module", [Attention, Checked])


def sample(height=7, width=9, batch=2):
    torch.manual_seed(height)
    return torch.randn(batch, height, width, 8)


def build(module=Attention):
    torch.manual_seed(0)
    return module()


def outputs_and_gradients(model, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_script():
    model, x = build(), sample()
    scripted = torch.jit.script(model)
    expected = outputs_and_gradients(model, x)
    for _ in range(3):  # the profiling executor optimises on the second and third call
        assert_same([scripted(x)], expected[:1])
        assert_same(torch.autograd.grad(scripted(x).square().sum(), list(model.parameters())), expected[1:])


def test_fx_and_script_of_fx():
    model, x = build(), sample()
    traced = torch.fx.symbolic_trace(model)
    assert_same(outputs_and_gradients(traced, x), outputs_and_gradients(model, x))
    assert_same([torch.jit.script(traced)(x)], [model(x)])


def test_trace():
    model = build()
    traced = torch.jit.trace(model, sample())
    assert_same([traced(sample(8, 6, 1))], [model(sample(8, 6, 1))])


@EITHER
def test_export_with_dynamic_sizes(module):
    model = build(module)
    # The checked function compares the window with the map, so its graph is for maps that the window fits.
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (sample(),), dynamic_shapes=(dynamic,))
    assert NODE in [str(node.target) for node in program.graph.nodes]
    for size in ((7, 9, 2), (6, 8, 3)):
        assert_same([program.module()(sample(*size))], [model(sample(*size))])


@EITHER
def test_compile_without_recompiles(module):
    model = build(module)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((7, 9), (6, 8), (12, 10)):
        assert_same(outputs_and_gradients(compiled, sample(*size)), outputs_and_gradients(model, sample(*size)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.long
def test_compile_with_inductor():
    """Inductor checks the outputs' strides against the fakes'."""
    model = build()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((7, 9), (6, 8), (12, 10)):
        assert_same(outputs_and_gradients(compiled, sample(*size)), outputs_and_gradients(model, sample(*size)))
    torch._dynamo.reset()


@pytest.mark.long
def test_onnx_under_reference(tmp_path):
    """On a map of several tiles."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build().eval(), sample(20, 17)
    to_onnx(model, x, tmp_path / "model.onnx")
    run, _ = open_file(tmp_path / "model.onnx")
    assert_same([run(x)], [model(x).detach()])


def test_reference_is_called_in_place_of_the_op():
    model, x = build(), sample()
    assert_same(*by_reference_and_by_op(lambda: outputs_and_gradients(model, x)))


def op_cases(dtype=torch.float32):
    """Arguments in the order of the op's schema: 1-D to 3-D, with and without each option."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    def qkv(*grid, heads=2, key_heads=2, batch=1):
        return random(batch, *grid, heads, 2), random(batch, *grid, key_heads, 2), random(batch, *grid, key_heads, 3)

    extra = (random(2, 2, 1, 2), random(2, 2, 1, 3))
    padding = (random(2, 2), random(2, 3))
    return {
        "1d": (*qkv(7), [3], [2], [2], [1], 0.5, None, None, random(2, 5), False),
        "2d": (*qkv(4, 5), [3, 2], [1, 2], [1, 2], [0, 1], 0.5, None, None, None, False),
        "2d_extra": (*qkv(3, 4, key_heads=1, batch=2), [3, 3], [1, 1], [1, 1], [0] * 2, 0.5, *extra, None, False),
        "2d_circular": (*qkv(4, 3), [5, 3], [1, 1], [1, 1], [0] * 2, 0.5, None, None, random(2, 9, 5), True),
        # Smaller than the window on one axis and on both; with keys and values for the tokens that are missing.
        "2d_zeros": (*qkv(2, 5), [3, 2], [1, 1], [1, 2], [0, 0], 0.5, None, None, random(2, 5, 3), False),
        "2d_padded": (*qkv(3, 2), [3, 2], [1, 1], [2, 2], [0] * 2, 0.5, None, None, random(2, 5, 3), False, *padding),
        "3d": (*qkv(2, 3, 3), [1, 3, 2], [1, 1, 2], [2, 1, 1], [0] * 3, 0.5, None, None, random(2, 1, 5, 3), False),
    }


CASES = pytest.mark.parametrize("case", op_cases())


@CASES
def test_opcheck(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(OP, op_cases()[case])


def differentiable(case):
    """The op as a function of its tensors, in float64, and the tensors."""
    torch.manual_seed(0)
    arguments = op_cases(torch.float64)[case]
    places = [number for number, x in enumerate(arguments) if isinstance(x, Tensor)]

    def function(*tensors):
        filled = list(arguments)
        for place, x in zip(places, tensors, strict=True):
            filled[place] = x
        return neighborhood_attention_op(*filled)

    return function, [arguments[place] for place in places]


# Along one direction drawn at random; entry by entry in the sweeps, as in the tests of the definitions.
EITHER_MODE = pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.long)])


@EITHER_MODE
@CASES
def test_gradcheck(case, fast_mode):
    function, tensors = differentiable(case)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=fast_mode)


@EITHER_MODE
@pytest.mark.parametrize("case", ["1d", "2d_extra", "2d_padded"])
def test_double_backward(case, fast_mode):
    function, tensors = differentiable(case)
    (grad,) = torch.autograd.grad(function(*tensors)[0].square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'double backward is not implemented.*visionmix.kernels.use\("reference"\)'):
        grad.sum().backward()
    with use("reference"):
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=fast_mode)


@CASES
def test_vmap(case):
    function, tensors = differentiable(case)
    stacked = [torch.stack([x, 2 * x]) for x in tensors]
    with pytest.raises(RuntimeError, match=r'vmap is not implemented.*visionmix.kernels.use\("reference"\)'):
        torch.vmap(function)(*stacked)
    with use("reference"):
        outs = torch.vmap(function)(*stacked)
        expected = [
            torch.stack(pair) for pair in zip(function(*tensors), function(*(2 * x for x in tensors)), strict=True)
        ]
        assert_same(outs, expected)


# Pairs of a query and a key of one head, counted by hand; dk 2 and dv 3, so 2 (2 + 3) = 10 operations a pair forward
# and 3 x 4 + 2 x 6 = 24 backward.
PAIRS = {
    # Even tokens 0 2 4 6: groups (0 2), (4 6), leaders 2 and 6 at places 1 and 3: windows 0, 0-1, 1-2, 1-3 (1+2+2+3);
    # odd tokens 1 3 5: groups (1 3), (5), leaders at 1 and 2: 0, 0-1, 0-2 (1+2+3). Two heads.
    "1d": 2 * (8 + 6),
    # Rows: 4 x 3. Columns, dilation 2, causal, groups of 2: 0 2 4: leaders 1, 1, 2: 1 + 2 + 2; 1 3: 1 + 2. Two heads.
    "2d": 2 * 12 * (5 + 3),
    # 12 queries, 9 keys and 2 additional ones, two heads, batch 2.
    "2d_extra": 2 * 2 * 12 * (9 + 2),
    # Radii 3 and 2: row offsets 0, +-1 and +-2 reach one column ((1 / 3)^2 + (1 / 2)^2 < 1, (2 / 3)^2 + (1 / 2)^2 < 1).
    # Pairs of rows: 4 + 2 x 3 + 2 x 2 = 14; of columns: 3 + 2 x 2 = 7.
    "2d_circular": 2 * 14 * 7,
    # Rows: 3 x 3, the third padded. Columns, dilation 2: 5 x 2. Two heads.
    "2d_zeros": 2 * 9 * 10,
    # Extended to 6 x 4. Rows, dilation 2: 2 classes of 3 x 3. Columns, dilation 2: 2 classes of 2 x 2. Two heads.
    "2d_padded": 2 * 18 * 8,
    # Levels: 2 x 1. Rows: 3 x 3. Columns: 3 x 2. Two heads.
    "3d": 2 * 2 * 9 * 6,
}


@CASES
def test_flops(case):
    with FlopCounterMode(display=False) as counter:
        OP(*op_cases()[case])[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert (counts[OP], counts[BACKWARD]) == (10 * PAIRS[case], 24 * PAIRS[case])


def test_pairs_of_a_published_stage():
    """nat_mini's first stage at 224 pixels: every query of 56 x 56 sees 49 keys."""
    assert count_pairs((56, 56), (7, 7), (1, 1), (1, 1), (False, False), False) == 56 * 56 * 49
