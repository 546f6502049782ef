"""The two halves of neighborhood attention against the whole, and against windows listed one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhoods import named_tensors
from profiled import by_reference_and_by_op
from tolerance import assert_close, assert_gradients_close, gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels import na2d, na2d_av, na2d_qk, use
from visionmix.kernels.neighborhood_attention.definition import axis_visible
from visionmix.kernels.neighborhood_attention.halves import neighborhood_scores_op, neighborhood_sums_op
from visionmix.kernels.neighborhood_attention.tables import Window

SCORES, SUMS = torch.ops.visionmix.neighborhood_scores, torch.ops.visionmix.neighborhood_sums


def make(grid, kernel_size, heads=2, key_heads=2, extra=0, bias=False, dim=4, value_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).double().requires_grad_()

    sizes = {"heads": heads, "key_heads": key_heads, "dim": dim, "value_dim": value_dim, "batch": 2}
    return named_tensors(random, grid, kernel_size, extra=extra, bias=bias, **sizes)


def halves(query, key, value, additional_keys=None, additional_values=None, relative_position_bias=None, **window):
    """`na2d` in two halves."""
    options = {"additional_keys": additional_keys, "relative_position_bias": relative_position_bias}
    scale = {"scale": window.pop("scale")} if "scale" in window else {}
    weights = na2d_qk(query, key, **window, **scale, **options).softmax(-1)
    return na2d_av(weights, value, **window, additional_values=additional_values)


@st.composite
def problems(draw):
    grid = tuple(draw(st.integers(1, 19)) for _ in range(2))
    circular = draw(st.booleans())
    if circular:
        kernel_size, stride = tuple(2 * draw(st.integers(0, 3)) + 1 for _ in grid), (1, 1)
        dilation = tuple(draw(st.integers(1, 4)) for _ in grid)
    else:
        kernel_size = tuple(draw(st.integers(1, n)) for n in grid)
        stride = tuple(draw(st.integers(1, k)) for k in kernel_size)
        dilation = tuple(draw(st.integers(1, n // k)) for n, k in zip(grid, kernel_size, strict=True))
    window = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "circular": circular}
    window["is_causal"] = tuple(draw(st.booleans()) for _ in grid)
    window["scale"] = draw(st.sampled_from([None, 0.3]))
    key_heads = draw(st.integers(1, 2))
    sizes = {
        "extra": draw(st.integers(0, 3)),
        "bias": draw(st.booleans()),
        "heads": key_heads * draw(st.integers(1, 2)),
    }
    return make(grid, kernel_size, key_heads=key_heads, seed=draw(st.integers(0, 9)), **sizes), window


def check_halves(problem):
    tensors, window = problem
    inputs = list(tensors.values())
    with use("reference"):
        expected = na2d(**tensors, **window)
    ours = halves(**tensors, **window)
    assert_close(ours, expected)
    pairs = zip(gradients(ours, inputs), gradients(expected, inputs), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-10) for one, other in pairs)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_halves_make_the_whole(problem):
    check_halves(problem)


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(problems())
def test_many_halves_make_the_whole(problem):
    check_halves(problem)


@pytest.mark.parametrize(
    ("grid", "kernel_size", "dilation"),
    [((56, 30), (7, 7), (4, 1)), ((40, 33), (3, 13), (1, 2)), ((56, 56), (3, 3), (1, 1))],
    ids=str,
)
def test_halves_of_maps_of_many_tiles(grid, kernel_size, dilation):
    check_halves((make(grid, kernel_size, bias=True), {"kernel_size": kernel_size, "dilation": dilation}))


def test_scores_stand_row_by_row_of_the_window():
    """Every window listed by the definition, key by key."""
    tensors = make((7, 9), (3, 4))
    q, k = tensors["query"], tensors["key"]
    scores = na2d_qk(q, k, (3, 4), dilation=(2, 1), is_causal=(False, True))
    rows, columns = axis_visible(7, 3, 1, 2, False), axis_visible(9, 4, 1, 1, True)
    for row, column in itertools.product(range(7), range(9)):
        seen = [k[:, r, c] for r in rows[row].nonzero().flatten() for c in columns[column].nonzero().flatten()]
        expected = torch.stack([(q[:, row, column] * key).sum(-1) / 2 for key in seen], -1)
        ours = scores[:, row, column].unflatten(-1, (3, 4))
        hidden = 4 - int(columns[column].sum())  # of a causal window's first columns
        assert torch.equal(ours[..., :hidden], torch.full_like(ours[..., :hidden], -torch.inf))
        assert torch.allclose(ours[..., hidden:].flatten(-2), expected, atol=1e-12)


def test_a_disc_of_three_is_the_square_cut_at_the_border():
    query, key = torch.ones(1, 5, 6, 1, 2), torch.ones(1, 5, 6, 1, 2)
    count = na2d_qk(query, key, 3, circular=True).isfinite().sum(-1)[0, :, :, 0]
    expected = torch.full((5, 6), 9)
    expected[[0, -1]], expected[:, [0, -1]], expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 6, 6, 4
    assert torch.equal(count, expected)


WINDOWS = [
    {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": (True, False)},
    {"kernel_size": 3, "circular": True},
]


# Along one direction drawn at random, and entry by entry in the sweeps; `check_halves` compares every entry, too.
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradcheck_of_halves(window, fast_mode):
    kernel_size = (3, 2) if "dilation" in window else (3, 3)
    tensors = make((3, 4), kernel_size, 2, 1, bias=True, dim=2, value_dim=2)
    query, key, value = (tensors[name][:1].detach().requires_grad_() for name in ("query", "key", "value"))
    weights = torch.randn_like(na2d_qk(query, key, **window), requires_grad=True)

    def qk(query, key, bias):
        scores = na2d_qk(query, key, **window, relative_position_bias=bias)
        return scores.masked_fill(scores == -torch.inf, 0)

    def av(weights, value):
        return na2d_av(weights, value, **window)

    for function, inputs in ((qk, (query, key, tensors["relative_position_bias"])), (av, (weights, value))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=fast_mode)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_weights_of_hidden_keys_are_not_read():
    tensors = make((5, 6), (3, 3))
    scores = na2d_qk(tensors["query"], tensors["key"], 3, circular=True)
    weights = torch.randn_like(scores)
    expected = na2d_av(weights, tensors["value"], 3, circular=True)
    poisoned = weights.masked_fill(scores == -torch.inf, torch.nan).requires_grad_()
    out = na2d_av(poisoned, tensors["value"], 3, circular=True)
    assert torch.equal(out, expected)
    (grad,) = gradients(out, [poisoned])
    assert grad.isfinite().all()
    assert not grad[scores == -torch.inf].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_in_half_precision(dtype):
    tensors = {name: x.detach().to(dtype) for name, x in make((9, 8), (3, 5), extra=2, bias=True).items()}
    doubles = {name: x.double() for name, x in tensors.items()}
    keys = {"additional_keys": tensors["additional_keys"], "relative_position_bias": tensors["relative_position_bias"]}
    with torch.autocast("cpu", dtype):
        scores = na2d_qk(tensors["query"], tensors["key"], (3, 5), **keys)
        out = na2d_av(scores.softmax(-1), tensors["value"], (3, 5), additional_values=tensors["additional_values"])
    assert (scores.dtype, out.dtype) == (torch.float32, dtype)
    assert_close(out, na2d(**doubles, kernel_size=(3, 5)))


def test_strides_of_halves():
    q, k, v = (x.detach() for x in make((9, 8), (3, 3)).values())
    weights = na2d_qk(q, k, 3).softmax(-1)
    permuted = [x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0) for x in (q, k, v, weights)]
    assert torch.equal(na2d_qk(permuted[0], permuted[1], 3), na2d_qk(q, k, 3))
    assert torch.equal(na2d_av(permuted[3], permuted[2], 3), na2d_av(weights, v, 3))
    expanded = k[:, :, :1].expand_as(k)
    assert torch.equal(na2d_qk(q, expanded, 3), na2d_qk(q, expanded.contiguous(), 3))


@pytest.mark.parametrize("grid", [(1, 1), (2, 7), (5, 2)])
def test_halves_of_a_map_smaller_than_the_window(grid):
    """The op extends the map by keys and values of zeros."""
    tensors = make(grid, (3, 3))
    window = Window((3, 3), (1, 1), (1, 1), (0, 0), circular=False).flat()
    scores = neighborhood_scores_op(tensors["query"], tensors["key"], window, 0.5, None, None)
    out = neighborhood_sums_op(scores.softmax(-1), tensors["value"], window, None)
    ends = [0, 0, 0, 0, 0, max(0, 3 - grid[1]), 0, max(0, 3 - grid[0])]
    padded = {name: nn.functional.pad(x, ends) for name, x in tensors.items()}
    with use("reference"):
        expected = na2d(**padded, kernel_size=3, scale=0.5)[:, : grid[0], : grid[1]]
    assert_close(out, expected)
    assert_gradients_close(gradients(out, list(tensors.values())), gradients(expected, list(tensors.values())))


@pytest.mark.long
def test_opcheck_of_scores():
    tensors = make((4, 5), (3, 3), extra=2, bias=True)
    window = Window((3, 3), (1, 1), (1, 1), (0, 0), circular=False).flat()
    keys = (tensors["additional_keys"], tensors["relative_position_bias"])
    torch.library.opcheck(SCORES, (tensors["query"], tensors["key"], window, 0.5, *keys))


def test_opcheck_of_sums():
    tensors = make((4, 5), (3, 3), extra=2)
    window = Window((3, 3), (1, 1), (1, 1), (0, 0), circular=False).flat()
    weights = torch.randn(2, 4, 5, 2, 11, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(SUMS, (weights, tensors["value"], window, tensors["additional_values"]))


class Halves(nn.Module):
    def __init__(self, circular: bool = False):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))
        self.window = Window((3, 3), (1, 1), (2, 1), (0, 0), circular).flat()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(3)
        weights = neighborhood_scores_op(q, k, self.window, 0.5, None, self.bias).softmax(-1)
        return neighborhood_sums_op(weights, v, self.window, None)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_graphs_of_halves(circular):
    model, x, other = Halves(circular).eval(), torch.randn(2, 7, 6, 8), torch.randn(3, 4, 9, 8)
    size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        expected = [model(x), model(other)]
        scripted = torch.jit.script(model)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        graphs = [scripted, compiled, torch.export.export(model, (x,), dynamic_shapes=({0: size, 1: size, 2: size},))]
        with use("reference"):
            graphs.append(torch.export.export(model, (x,), dynamic_shapes=({0: size, 1: size, 2: size},)))
        nodes = [{str(node.target) for node in graph.graph.nodes} for graph in graphs[2:]]
        assert [any("neighborhood" in name for name in names) for names in nodes] == [True, False]
        for graph in graphs:
            run = graph.module() if isinstance(graph, torch.export.ExportedProgram) else graph
            for image, out in zip((x, other), expected, strict=True):
                torch.testing.assert_close(run(image), out)


def test_flops_of_halves():
    tensors = make((5, 6), (3, 3), extra=2)
    with FlopCounterMode(display=False) as counter:
        halves(**tensors, kernel_size=3)
    counts = counter.get_flop_counts()["Global"]
    pairs = 2 * 2 * 30 * (9 + 2)  # images, heads, queries, keys
    assert (counts[SCORES], counts[SUMS]) == (2 * 4 * pairs, 2 * 5 * pairs)
    with FlopCounterMode(display=False) as counter:
        na2d_qk(tensors["query"], tensors["key"], 3, circular=True)
    assert counter.get_total_flops() == 2 * 4 * 2 * 2 * (12 * 9 + 14 * 6 + 4 * 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": lambda x: x.long()}, TypeError, "key has dtype torch.int64"),
        ({"query": lambda x: x[0]}, ValueError, "query has shape .*; it must have 5 axes"),
        ({"key": lambda x: x[:, 1:]}, ValueError, r"key has shape \(2, 4, 9, 2, 4\).*rows=5"),
        ({"query": lambda x: x[..., :1, :]}, ValueError, "query has 1 heads, but key 2; theirs must divide"),
        ({"query": lambda x: x[..., :0], "key": lambda x: x[..., :0]}, ValueError, "head dimension must be at least 1"),
        ({"additional_keys": lambda x: x[:1]}, ValueError, "additional_keys has shape .*batch=2"),
        ({"relative_position_bias": lambda x: x[:, 1:]}, ValueError, "relative_position_bias has shape"),
        ({"kernel_size": lambda x: 7}, ValueError, "kernel_size=7 does not fit a 5x9 grid"),
        ({"kernel_size": lambda x: 3.0}, TypeError, "kernel_size=3.0 holds a float"),
    ],
)
def test_wrong_arguments_of_na2d_qk_are_named(change, error, message):
    tensors = make((5, 9), (3, 3), extra=2, bias=True)
    given = {name: x for name, x in tensors.items() if "value" not in name} | {"kernel_size": 3}
    with pytest.raises(error, match=message):
        na2d_qk(**given | {name: wrong(given[name]) for name, wrong in change.items()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": lambda x: None}, TypeError, "weights is a NoneType"),
        ({"weights": lambda x: x[..., 1:]}, ValueError, r"weights has shape .*window=11"),
        ({"weights": lambda x: x[:, 1:]}, ValueError, "weights has shape .*rows=5"),
        ({"weights": lambda x: x[..., :1, :]}, ValueError, "weights has 1 heads, but value 2; theirs must divide"),
        ({"additional_values": lambda x: x[..., 1:]}, ValueError, "additional_values has shape .*dim=5"),
        ({"value": lambda x: x[:, :0]}, ValueError, "value has shape .*; the map"),
        ({"dilation": lambda x: 2}, ValueError, "kernel_size=3 does not fit a 5x9 grid with dilation=2"),
        ({"circular": lambda x: True, "kernel_size": lambda x: 2}, ValueError, "kernel_size=2 must be odd"),
    ],
)
def test_wrong_arguments_of_na2d_av_are_named(change, error, message):
    tensors = make((5, 9), (3, 3), extra=2)
    given = {"weights": torch.randn(2, 5, 9, 2, 11).double(), "value": tensors["value"], "kernel_size": 3}
    given |= {"additional_values": tensors["additional_values"], "dilation": 1, "circular": False}
    with pytest.raises(error, match=message):
        na2d_av(**given | {name: wrong(given[name]) for name, wrong in change.items()})


def test_the_reference_calls_no_op():
    tensors = make((7, 6), (3, 3))

    def run():
        out = halves(**tensors, kernel_size=3)
        return [out, *gradients(out, list(tensors.values()))]

    assert all(map(torch.equal, *by_reference_and_by_op(run)))
