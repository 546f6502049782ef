import inspect
import itertools
import pickle

import golden
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory import PeakMemory
from neighborhood_runs import (
    ARGUMENTS,
    CHOICES,
    COMPILED,
    EACH_CHOICE,
    EXPORTED,
    EXPORTED_TOO,
    FUNCTIONS,
    WINDOW,
    cast,
    check,
    choose,
    compiled_choices,
    make,
    naive,
    run,
)
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import dispatch, na1d, na2d, na3d, use
from visionmix.kernels.neighborhood_attention import definition, neighborhood_attention_op, reference
from visionmix.kernels.neighborhood_attention.schema import Arguments, Gradients

# NATTEN's own problem sizes, the small ones: heads, key heads, grid, kernel_size, stride, dilation.
NATTEN = [
    (4, 2, (128,), (63,), (31,), (1,)),
    (1, 1, (128,), (3,), (1,), (1,)),
    (1, 1, (128,), (3,), (2,), (5,)),
    (2, 2, (128,), (15,), (1,), (1,)),
    (1, 1, (128,), (3,), (2,), (10,)),
    (1, 1, (128,), (8,), (7,), (5,)),
    (1, 1, (128,), (61,), (33,), (1,)),
    (2, 2, (125,), (15,), (1,), (1,)),
    (4, 4, (5, 25), (5, 16), (1, 16), (1, 1)),
    (4, 1, (5, 25), (5, 16), (1, 16), (1, 1)),
    (1, 1, (84, 19), (7, 3), (1, 1), (5, 1)),
    (1, 1, (19, 29), (8, 8), (1, 1), (2, 3)),
    (1, 1, (48, 17), (24, 16), (1, 1), (2, 1)),
    (1, 1, (8, 8), (8, 8), (1, 1), (1, 1)),
    (1, 1, (16, 16), (16, 16), (4, 5), (1, 1)),
    (1, 1, (16, 16), (14, 14), (1, 1), (1, 1)),
    (1, 1, (40, 20), (3, 7), (1, 1), (1, 1)),
    (1, 1, (16, 16), (3, 3), (1, 1), (1, 1)),
    (4, 1, (8, 8, 16), (3, 3, 3), (2, 1, 2), (2, 2, 4)),
    (1, 1, (13, 11, 9), (3, 4, 3), (2, 3, 3), (3, 2, 2)),
    (1, 1, (8, 4, 8), (7, 3, 7), (1, 1, 1), (1, 1, 1)),
    (2, 2, (8, 8, 10), (3, 4, 3), (3, 4, 1), (1, 1, 1)),
]
LARGE = [
    (1, 1, (67, 80), (12, 7), (8, 4), (5, 11)),
    (1, 1, (33, 33), (24, 16), (1, 1), (1, 1)),
    (1, 1, (44, 80), (44, 80), (4, 8), (1, 1)),
    (1, 1, (44, 80), (9, 10), (1, 1), (1, 1)),
    (1, 1, (28, 40), (17, 31), (1, 1), (1, 1)),
    (1, 1, (36, 40), (36, 40), (12, 13), (1, 1)),
    (1, 1, (2048,), (2048,), (1,), (1,)),
    (2, 1, (14, 8, 8), (7, 5, 5), (2, 1, 3), (2, 1, 1)),
    (1, 1, (12, 17, 12), (7, 8, 12), (6, 8, 1), (1, 2, 1)),
    (2, 2, (5, 45, 13), (2, 7, 6), (1, 4, 6), (2, 2, 2)),
    (4, 2, (32, 10, 10), (7, 3, 3), (5, 1, 1), (1, 2, 3)),
]


def natten_case(problem, is_causal, *choices, extra):
    heads, key_heads, grid, kernel_size, stride, dilation = problem
    tensors = make(grid, kernel_size, heads, key_heads, extra=extra, bias=len(grid) < 3, batch=1)
    window = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    check(tensors, window, *choices)


# The reference's own backward is the same code for every window: it takes part in the causal first axis alone.
@pytest.mark.parametrize(("is_causal", "choice"), [("none", "reference"), ("first", "op"), ("all", "reference")])
@pytest.mark.parametrize("problem", NATTEN, ids=str)
def test_natten_problem_sizes(problem, is_causal, choice):
    axes = len(problem[2])
    causal = {"none": [False] * axes, "first": [True] + [False] * (axes - 1), "all": [True] * axes}[is_causal]
    natten_case(problem, causal, choice, *compiled_choices(), extra=3 if is_causal == "first" else 0)


@pytest.mark.long
@EACH_CHOICE
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_natten_large_problem_sizes(problem, choice):
    for is_causal in itertools.product([False, True], repeat=len(problem[2])):
        natten_case(problem, is_causal, choice, extra=0)


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    most = {1: 70, 2: 21, 3: 9}[axes]
    grid = tuple(draw(st.integers(1, most)) for _ in range(axes))
    circular = draw(st.booleans())
    if circular:
        kernel_size = tuple(2 * draw(st.integers(0, 4)) + 1 for _ in grid)
        stride = (1,) * axes
        dilation = tuple(draw(st.integers(1, 4)) for _ in grid)
    else:
        kernel_size = tuple(draw(st.integers(1, n)) for n in grid)
        stride = tuple(draw(st.integers(1, k)) for k in kernel_size)
        dilation = tuple(draw(st.integers(1, n // k)) for n, k in zip(grid, kernel_size, strict=True))
    window = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "circular": circular}
    window["is_causal"] = tuple(draw(st.booleans()) for _ in grid)
    window["scale"] = draw(st.sampled_from([None, 0.3]))
    key_heads = draw(st.integers(1, 2))
    sizes = {"dim": draw(st.integers(1, 19)), "value_dim": draw(st.integers(1, 19)), "extra": draw(st.integers(0, 3))}
    bias = draw(st.booleans())
    heads = key_heads * draw(st.integers(1, 2))
    return make(grid, kernel_size, heads, key_heads, bias=bias, seed=draw(st.integers(0, 9)), **sizes), window


def check_drawn(problem, choice):
    tensors, window = problem
    # A gradient that cancels to nothing has no relative error: alone with its key, a query changes nothing, and a bias
    # sums one term of either sign for every query, which leaves about the root of their number.
    (_, lse), grads = naive(tensors, **window)
    queries = lse.numel() // lse.shape[-1]
    for name, grad in zip(tensors, grads, strict=True):
        assume(grad.abs().max() > 0.1 * (queries**0.5 if name == "relative_position_bias" else 1))
    check(tensors, window, choice)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(CHOICES))
def test_drawn_problems(problem, choice):
    check_drawn(problem, choice)


@settings(max_examples=12, deadline=None)
@given(problems(), st.sampled_from(EXPORTED))
def test_drawn_problems_in_exported_graphs(problem, choice):
    check_drawn(problem, choice)


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(problems(), st.sampled_from((*CHOICES, *EXPORTED)))
def test_many_drawn_problems(problem, choice):
    check_drawn(problem, choice)


@pytest.mark.parametrize(
    ("grid", "kernel_size", "dilation"),
    [((24, 40), 7, 1), ((56, 30), 7, 4), ((300,), 7, 3), ((300,), 299, 1), ((7, 150), 5, 1)],
    ids=str,
)
def test_maps_wider_than_a_vector(grid, kernel_size, dilation):
    """More than one vector, tile, band and strip of the compiled kernel; more than one tile of the reference."""
    tensors = make(grid, [kernel_size] * len(grid), dim=8, value_dim=8, bias=True, batch=1)
    check(tensors, {"kernel_size": kernel_size, "dilation": dilation}, *CHOICES)


@EXPORTED_TOO
def test_many_additional_keys(choice):
    check(make((9, 20), (3, 3), 4, 2, dim=17, extra=150), {"kernel_size": 3}, choice)


@EXPORTED_TOO
def test_disc_on_residue_classes_of_two_lengths(choice):
    """The reference pads the shorter class with queries whose disc holds no key of it."""
    check(make((4, 7), (1, 3)), {"kernel_size": (1, 3), "dilation": (3, 5), "circular": True}, choice)


_META, _ARRAYS = golden.load("op_na2d")


@EACH_CHOICE
@pytest.mark.parametrize("case", _META["cases"], ids=lambda case: f"case{case['case']}")
def test_golden_of_neighborhood_attention(case, choice):
    def read(name):  # heads first on file
        x = torch.from_numpy(_ARRAYS[f"case{case['case']}_{name}"])
        return x.float() if x.dim() == 3 else x.movedim(1, 3).float()

    names = ("q", "k", "v", "rpb") if case["rpb"] else ("q", "k", "v")
    inputs = [read(name).requires_grad_() for name in names]
    with choose(choice):
        bias = inputs[3] if case["rpb"] else None
        out = na2d(*inputs[:3], case["kernel"], dilation=case["dilation"], relative_position_bias=bias)
        grads = torch.autograd.grad((out * read("w")).sum(), inputs)
    assert_close(out, read("out"), "out")
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, read(f"d{name}"), f"d{name}")


@EXPORTED_TOO
def test_circular_window_is_that_of_clear(choice):
    """CLEAR's attention: image tokens see a disc and the text, text tokens see everything."""
    meta, arrays = golden.load("clear_local")
    weights = golden.state_dict(meta)
    heads, text, height, width, radius = (meta["kwargs"][x] for x in ("heads", "text", "h", "w", "window_size"))
    x = golden.image(17, 32).reshape(1, text + height * width, 24)
    qkv = torch.nn.functional.linear(x, weights["qkv.weight"], weights["qkv.bias"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    near_text = torch.nn.functional.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q[:, :text], k, v))
    ).transpose(1, 2)
    maps = [y[:, text:].unflatten(1, (height, width)) for y in (q, k, v)]
    with choose(choice):
        image = na2d(*maps, 2 * radius - 1, circular=True, additional_keys=k[:, :text], additional_values=v[:, :text])
    out = torch.cat((near_text, image.flatten(1, 2)), 1).flatten(2)
    out = torch.nn.functional.linear(out, weights["proj.weight"], weights["proj.bias"])
    assert golden.relative_error(out, arrays["logits"]) < 1e-5


@EXPORTED_TOO
def test_window_of_the_whole_map_is_attention(choice):
    tensors = cast(make((5, 6), (5, 6)), torch.float32)
    with choose(choice):
        out = na2d(**tensors, kernel_size=(5, 6))
    flat = [x.flatten(1, 2).transpose(1, 2) for x in tensors.values()]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat)
    assert_close(out, expected.transpose(1, 2).unflatten(1, (5, 6)))


@EACH_CHOICE
def test_strides_of_neighborhood_attention(choice):
    """A fused projection's slices, permuted and expanded inputs give what their copies give, laid out afresh."""
    q, k, _ = torch.randn(2, 9, 20, 3, 2, 12).unbind(3)
    v = torch.randn(2, 1, 8, 9, 20).expand(-1, 2, -1, -1, -1).permute(0, 3, 4, 1, 2)
    inputs = [x.requires_grad_() for x in (q.detach(), k.detach(), v)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
    with choose(choice):
        actual, expected = na2d(*inputs, 5, return_lse=True), na2d(*copies, 5, return_lse=True)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous()
        assert all(map(torch.equal, gradients(actual, inputs), gradients(expected, copies)))


@EACH_CHOICE
def test_bitwise_repeatable_on_any_number_of_threads(choice):
    tensors = cast(make((20, 40), (7, 7), 4, 2, extra=5, bias=True, dim=8), torch.float32)
    threads = torch.get_num_threads()
    results = []
    with choose(choice):
        # PyTorch's own products depend on the number of threads; the compiled kernel does not.
        for count in (1, 2, 3) if choice == "cpu" else (1, 1):
            torch.set_num_threads(count)
            outs, grads = run(tensors, {"kernel_size": 7})
            results.append([*outs, *grads])
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@EXPORTED_TOO
def test_extreme_scores(choice):
    """Scores of some thousands neither overflow nor lose the largest key; a bias of -inf hides keys."""
    tensors = cast(make((9, 20), (5, 5), bias=True), torch.float32 if choice == "cpu" else torch.float64)
    with torch.no_grad():
        tensors["query"].mul_(1000)
        tensors["relative_position_bias"][:, :4] = -torch.inf
    doubles = {name: x.detach().double() for name, x in tensors.items()}
    window = ((5, 5), (1, 1), (1, 1), (False, False), 0.5)
    options = (None, None, doubles["relative_position_bias"], False)
    expected, expected_lse = definition.neighborhood_attention(
        Arguments(doubles["query"], doubles["key"], doubles["value"], *window, *options)
    )
    # A query of the last rows sees rows above it alone: every key of its window but its own row's is hidden.
    with choose(choice):
        out, lse = na2d(**tensors, kernel_size=5, scale=0.5, return_lse=True)
    assert out.isfinite().all()
    assert_close(lse, expected_lse)
    assert_close(out, expected, factor=100)


@EXPORTED_TOO
def test_nan_in_a_query_stays_there(choice):
    tensors = cast(make((12, 20), (3, 3)), torch.float32)
    with choose(choice), torch.no_grad():
        clean = na2d(**tensors, kernel_size=3)
        tensors["query"][0, 4, 5, 1] = torch.nan
        out = na2d(**tensors, kernel_size=3)
    assert out[0, 4, 5, 1].isnan().all()
    out[0, 4, 5, 1] = clean[0, 4, 5, 1]
    assert torch.equal(out, clean)


@EACH_CHOICE
@pytest.mark.parametrize(("row", "column"), [(4, 5), (1, 17), (11, 0)])  # inside, and where windows are shifted
def test_nan_in_a_key_reaches_the_queries_that_see_it(row, column, choice):
    tensors = cast(make((12, 20), (3, 3)), torch.float32)
    values = torch.zeros_like(tensors["value"])
    values[0, row, column, 1] = 1
    with choose(choice), torch.no_grad():
        sees = na2d(tensors["query"], tensors["key"], values, kernel_size=3) > 0
        clean = na2d(**tensors, kernel_size=3)
        tensors["key"][0, row, column, 1] = torch.nan
        out = na2d(**tensors, kernel_size=3)
    assert sees.any()
    assert torch.equal(out.isnan(), sees)
    assert torch.equal(out[~sees], clean[~sees])


@pytest.mark.parametrize(
    ("grid", "dilation"), [((4, 9), 2), ((9, 4), 2), ((5, 3), 2), ((1, 1), 2), ((2, 7), 1), ((1, 2), 1)]
)
@pytest.mark.parametrize("filled", [True, False], ids=["filled", "zeros"])
@EXPORTED_TOO
def test_a_map_smaller_than_the_window_is_padded(grid, filled, dilation, choice):
    """Against maps extended by `F.pad` and cropped around the definition, with the gradients of the padding."""
    window = ((3, 3), (1, 1), (dilation, dilation), (0, 0), 0.5)
    tensors = make(grid, (3, 3), bias=True, key_heads=1)
    if filled:
        paddings = make((), (), key_heads=1, batch=1, seed=1)
        tensors |= {f"{name}_padding": paddings[name][0].detach().requires_grad_() for name in ("key", "value")}
    ends = [0, 0, 0, 0, *(end for size in reversed(grid) for end in (0, max(0, 3 * dilation - size)))]
    outside = 1 - F.pad(torch.ones(1, *grid, 1, 1, dtype=torch.float64), ends)

    def composed(query, key, value, relative_position_bias, key_padding=0.0, value_padding=0.0):
        key, value = F.pad(key, ends) + outside * key_padding, F.pad(value, ends) + outside * value_padding
        options = (None, None, relative_position_bias, False)
        outs = definition.neighborhood_attention(Arguments(F.pad(query, ends), key, value, *window, *options))
        return [out[:, : grid[0], : grid[1]] for out in outs]

    def ours(query, key, value, relative_position_bias, key_padding=None, value_padding=None):
        options = (None, None, relative_position_bias, False, key_padding, value_padding)
        return neighborhood_attention_op(query, key, value, *map(list, window[:4]), window[4], *options)

    expected = composed(**tensors)
    inputs = cast(tensors, torch.float32 if choice == "cpu" else torch.float64)
    with choose(choice):
        outs = ours(**inputs)
        grads = gradients(outs, list(inputs.values()))
    for out, like in zip(outs, expected, strict=True):
        assert_close(out, like)
        assert out.is_contiguous()
    assert_gradients_close(grads, gradients(expected, list(tensors.values())))


@EXPORTED_TOO
def test_empty_batch_of_neighborhood_attention(choice):
    tensors = make((5, 6), (3, 3), batch=0, extra=2, bias=True)
    with choose(choice):
        (out, lse), grads = run(cast(tensors, torch.float32), {"kernel_size": 3})
    assert out.shape == (0, 5, 6, 2, 5)
    assert lse.shape == (0, 5, 6, 2)
    assert [grad.shape for grad in grads] == [x.shape for x in tensors.values()]
    assert not grads[-1].any()


@pytest.mark.parametrize("axes", FUNCTIONS)
def test_functions_describe_themselves(axes):
    """They are made of one function, by which help, pickle and editors must not be led astray."""
    function = FUNCTIONS[axes]
    assert function.__name__ == f"na{axes}d"
    assert pickle.loads(pickle.dumps(function)) is function
    assert [*inspect.signature(function).parameters][:8] == [*ARGUMENTS[:3], *WINDOW]
    assert f"relative_position_bias: (heads, {', '.join(['2 k - 1'] * axes)})" in inspect.getdoc(function)


def test_without_lse_the_output_alone():
    tensors = make((7,), (3,))
    assert torch.equal(na1d(**tensors, kernel_size=3), na1d(**tensors, kernel_size=3, return_lse=True)[0])


def test_reference_holds_no_scores_of_the_whole_map(monkeypatch):
    """In the op's mode; the weights of the whole map would take 14 MB, its gradients as much again."""
    monkeypatch.setattr(reference, "_SCORES", 1 << 16)
    tensors = {name: x.detach() for name, x in cast(make((96, 96), (7, 7), 4, 4, value_dim=4), torch.float32).items()}
    window = ([7, 7], [1, 1], [1, 1], [0, 0], 1.0, None, None, None, False)
    arguments = Arguments(*tensors.values(), *window)
    with PeakMemory() as memory:
        out, lse = reference.forward(arguments)
        reference.backward(arguments, Gradients(out, lse, out, lse))
    size = tensors["query"].numel() * 4
    # Beside tensors as large as the inputs, a few tiles.
    assert memory.peak < 11 * size + 2**22


@COMPILED
def test_float64_takes_the_reference_and_says_so(caplog):
    dispatch.log_slow_path.cache_clear()
    with use("cpu"):
        tensors = make((7, 7), (3, 3))
        out, lse = na2d(**tensors, kernel_size=3, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert "neighborhood_attention runs its PyTorch reference: the compiled kernel has no float64" in caplog.text


def replaced(**values):
    tensors = {name: x.detach() for name, x in make((5, 9), (3, 3), 4, 2, extra=2, bias=True).items()}
    for name, value in values.items():
        tensors[name] = value(tensors[name]) if callable(value) else value
    return tensors


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"query": lambda x: x.int()}, TypeError, r"query has dtype torch.int32; convert"),
        ({"key": lambda x: x.cfloat()}, TypeError, r"key has dtype torch.complex64"),
        ({"value": lambda x: x.numpy()}, TypeError, r"value is a ndarray; it must be a tensor"),
        ({"query": lambda x: x[0]}, ValueError, r"query has shape \(5, 9, 4, 4\); it must have 5 axes"),
        ({"key": lambda x: x[:, 1:]}, ValueError, r"key has shape \(2, 4, 9, 2, 4\).*rows=5"),
        ({"value": lambda x: x[:1]}, ValueError, r"value has shape \(1, 5, 9, 2, 5\).*batch=2"),
        ({"key": lambda x: x[..., :1, :]}, ValueError, r"key has shape .*heads=2"),
        ({"query": lambda x: x[..., :3, :]}, ValueError, r"query has 3 heads, but key and value 2; theirs must divide"),
        ({"query": lambda x: x[..., :0]}, ValueError, r"query has shape \(2, 5, 9, 4, 0\)"),
        ({"value": lambda x: x.to("meta")}, ValueError, r"value is on meta, but query on cpu; move them"),
        ({"additional_keys": None}, ValueError, r"additional_keys is None; .* must be given together"),
        ({"additional_values": None}, ValueError, r"additional_values is None; .* must be given together"),
        ({"additional_values": lambda x: x[:, 1:]}, ValueError, r"additional_values has shape .*extra=2"),
        ({"relative_position_bias": lambda x: x[:, 1:]}, ValueError, r"relative_position_bias has shape \(4, 4, 5\)"),
        ({"relative_position_bias": lambda x: x[:2]}, ValueError, r"relative_position_bias has shape .*heads=4"),
    ],
)
def test_bad_tensors(values, error, message):
    with pytest.raises(error, match=message):
        na2d(**replaced(**values), kernel_size=3)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (
            {"kernel_size": 7, "dilation": 2},
            ValueError,
            r"^kernel_size=7 does not fit a 5x9 grid with dilation=2; it needs at least 14 rows$",
        ),
        ({"kernel_size": (3, 5), "dilation": (1, 2)}, ValueError, r"kernel_size=\(3, 5\).*at least 10 columns"),
        ({"kernel_size": 3, "stride": 4}, ValueError, r"stride=4 is larger than kernel_size=3"),
        ({"kernel_size": 0}, ValueError, r"kernel_size=0 must be at least 1"),
        ({"kernel_size": 3, "dilation": -1}, ValueError, r"dilation=-1 must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size=\(3, 3, 3\) has 3 values; na2d takes one, or 2"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size=3.0 holds a float; it must be int"),
        ({"kernel_size": True}, TypeError, r"kernel_size=True holds a bool"),
        ({"kernel_size": 3, "is_causal": 1}, TypeError, r"is_causal=1 holds a int; it must be bool"),
        ({"kernel_size": 4, "circular": True}, ValueError, r"kernel_size=4 must be odd for a circular window"),
        ({"kernel_size": 3, "stride": 2, "circular": True}, ValueError, r"stride=2 does not go with a circular window"),
    ],
)
def test_bad_windows(window, error, message):
    tensors = {name: x.detach() for name, x in make((5, 9), (3, 3)).items()}
    with pytest.raises(error, match=message):
        na2d(**tensors, **window)


def test_other_functions_name_their_axes():
    with pytest.raises(ValueError, match=r"does not fit a 8 grid with dilation=3; it needs at least 9 tokens"):
        na1d(**make((8,), (3,)), kernel_size=3, dilation=3)
    with pytest.raises(ValueError, match=r"does not fit a 2x5x5 grid with dilation=1; it needs at least 3 levels"):
        na3d(**make((2, 5, 5), (3,) * 3), kernel_size=3)
