"""The compiled kernel of gated linear attention against the float64 reference: outputs and every gradient."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import sizes
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import bidirectional_gated_linear_attention, dispatch, gated_linear_attention, use


@pytest.fixture(autouse=True, scope="module")
def compiled():
    try:
        dispatch.load("gated_linear_attention", "cpu")
    except dispatch.Unavailable as error:
        pytest.skip(str(error))
    with use("cpu"):
        yield


def make(batch, length, heads, dk, dv, seed=0, strength=1.0, dtype=torch.float32):
    """Return q, k, v, both gates and a state; exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = (batch, length, heads)
    gates = (F.logsigmoid(random(*tokens, dk)) * strength for _ in range(2))
    inputs = (random(*tokens, dk), random(*tokens, dk), random(*tokens, dv), *gates, random(batch, heads, dk, dv))
    return [x.to(dtype).requires_grad_() for x in inputs]


def one_way(q, k, v, g, _g_backward, state):
    return gated_linear_attention(q, k, v, g, 0.3, state, True)


def both_ways(q, k, v, g_forward, g_backward, _state):
    return bidirectional_gated_linear_attention(q, k, v, g_forward, g_backward, 0.3)


EACH_WAY = pytest.mark.parametrize(("attention", "used"), [(one_way, (0, 1, 2, 3, 5)), (both_ways, (0, 1, 2, 3, 4))])


def as_list(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def run(attention, inputs, used):
    """Return the outputs as a list, and the gradients of the inputs used."""
    out = attention(*inputs)
    return as_list(out), gradients(out, [inputs[i] for i in used])


def reference(attention, inputs, used):
    with use("reference"):
        return run(attention, [x.detach().double().requires_grad_() for x in inputs], used)


def compare(attention, inputs, used, factor=1.0):
    outs, grads = run(attention, inputs, used)
    expected_outs, expected_grads = reference(attention, inputs, used)
    for ours, theirs in zip(outs, expected_outs, strict=True):
        assert_close(ours, theirs, factor=factor)
    assert_gradients_close(grads, expected_grads, factor=factor)


@EACH_WAY
@pytest.mark.parametrize("length", [7, 31, 32, 33, 49, 63, 64, 65, 100, 196, 333])
def test_lengths(length, attention, used):
    compare(attention, make(2, length, 2, 32, 64), used, factor=0.2)


@EACH_WAY
@pytest.mark.parametrize(("dk", "dv"), [(1, 1), (5, 9), (8, 16), (16, 32), (17, 33), (40, 48), (64, 128), (100, 20)])
def test_dimensions(dk, dv, attention, used):
    compare(attention, make(1, 70, 3, dk, dv), used, factor=0.2)


@settings(max_examples=30, deadline=None)
@given(
    sizes(3, 80, 3, 40, 40),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.integers(0, 9),
)
def test_any_shape(size, strength, seed):
    inputs = make(*size, seed, strength)
    compare(one_way, inputs, (0, 1, 2, 3, 5))
    if size[1] > 1:  # the gates of a single token have no effect
        compare(both_ways, inputs, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_a_single_token(merge):
    q, k, v, g, h, state = make(2, 1, 3, 8, 6)
    out = bidirectional_gated_linear_attention(q, k, v, g, h, 1.0, merge)
    assert_close(out, (q * k).sum(-1, keepdim=True) * v * (1 if merge == "mean" else 2))
    for grad in torch.autograd.grad(out.sum(), (g, h)):
        assert torch.equal(grad, torch.zeros_like(grad))
    compare(one_way, (q, k, v, g, h, state), (0, 1, 2, 3, 5))


@EACH_WAY
@pytest.mark.parametrize("decay", [-50.0, -1e3, -float("inf")])
@pytest.mark.parametrize("every", [1, 7])
def test_strong_decay(decay, every, attention, used):
    inputs = make(1, 80, 2, 16, 16)
    with torch.no_grad():
        for gate in inputs[3:5]:
            gate[:, ::every] = decay
    outs, grads = run(attention, inputs, used)
    expected_outs, expected_grads = reference(attention, inputs, used)
    for ours, theirs in zip(outs, expected_outs, strict=True):
        assert_close(ours, theirs)
    for i, ours, theirs in zip(used, grads, expected_grads, strict=True):
        # exp(-50) is a float32: the gates' gradients are as exact as the others. exp(-1e3) is 0, as they then are.
        if theirs.abs().max() > 1e-30:
            assert_close(ours, theirs, f"gradient {i}")
        else:
            assert ours.abs().max() <= 1e-30


@EACH_WAY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, attention, used):
    inputs = make(2, 49, 2, 16, 32, strength=1 / 16, dtype=dtype)
    outs, grads = run(attention, inputs, used)
    assert outs[0].dtype == dtype
    assert all(x.dtype == torch.float32 for x in outs[1:])
    assert all(grad.dtype == dtype for grad in grads)
    compare(attention, inputs, used)


MIXED = [torch.bfloat16, torch.float16, torch.float32, torch.float16, torch.bfloat16, torch.float16]


@EACH_WAY
@pytest.mark.parametrize(("length", "dk", "dv"), [(1, 1, 1), (33, 5, 9), (70, 32, 64), (50, 40, 17), (196, 17, 33)])
@pytest.mark.parametrize(
    "dtypes", [[torch.bfloat16] * 6, [torch.float16] * 6, MIXED], ids=["bfloat16", "float16", "mixed"]
)
def test_half_precision_is_read_and_written_as_its_float32_copies_rounded_once(dtypes, length, dk, dv, attention, used):
    inputs = []
    for x, dtype in zip(make(2, length, 3, dk, dv), dtypes, strict=True):
        whole = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=dtype)
        inputs.append(whole.transpose(1, 2).clone().transpose(1, 2)[..., 2:-1].copy_(x.detach()).requires_grad_())
    copies = [x.detach().float().requires_grad_() for x in inputs]
    outs, expected_outs = (as_list(attention(*x)) for x in (inputs, copies))
    assert outs[0].dtype == inputs[2].dtype
    assert torch.equal(outs[0], expected_outs[0].to(inputs[2].dtype))
    assert all(map(torch.equal, outs[1:], expected_outs[1:]))  # states are float32
    weights = [torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(2)) for x in outs]
    grads, expected_grads = (
        torch.autograd.grad(
            results, [x[i] for i in used], [w.to(y.dtype) for w, y in zip(weights, results, strict=True)]
        )
        for results, x in ((outs, inputs), (expected_outs, copies))
    )
    for i, ours, theirs in zip(used, grads, expected_grads, strict=True):
        assert ours.dtype == inputs[i].dtype
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "dv"), [(7, 5), (100, 48)])
def test_an_output_of_another_type_is_rounded_once(length, dv, dtype, out_dtype):
    inputs = [x.detach() for x in make(1, length, 2, 12, dv, dtype=dtype)[:5]]
    out = bidirectional_gated_linear_attention(*inputs, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert torch.equal(out, bidirectional_gated_linear_attention(*(x.float() for x in inputs)).to(out_dtype))


def test_float64_goes_to_the_reference_and_says_so(caplog):
    dispatch.log_slow_path.cache_clear()
    inputs = [x.detach().double() for x in make(1, 20, 1, 4, 4)]
    with caplog.at_level(logging.WARNING, logger="visionmix.kernels"):
        out = both_ways(*inputs)
        both_ways(*inputs)
    assert len(caplog.records) == 1
    assert "float64" in caplog.text
    with use("reference"):
        assert torch.equal(out, both_ways(*inputs))


@EACH_WAY
def test_strides(attention, used):
    """Permuted, sliced and expanded inputs give, to the bit, what their copies give."""
    base = torch.randn(2, 3, 40, 50)
    q = base[..., :16, :].permute(0, 3, 1, 2)  # channels apart
    k = torch.randn(50, 1, 3, 16).expand(-1, 2, -1, -1).transpose(0, 1)  # batches on top of each other
    v = torch.randn(2, 100, 3, 50)[:, ::2, :, 7:31]
    g, g_backward = (-torch.rand(2, 3, 50, 16).transpose(1, 2) for _ in range(2))  # heads first
    state = torch.randn(2, 3, 24, 16).transpose(2, 3)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, g, g_backward, state)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
    (outs, grads), (expected_outs, expected_grads) = (run(attention, x, used) for x in (inputs, copies))
    assert all(map(torch.equal, outs, expected_outs))
    assert all(map(torch.equal, grads, expected_grads))
    assert all(x.is_contiguous() for x in outs)


def test_an_expanded_gradient():
    inputs = make(2, 20, 2, 8, 8)
    expected = torch.autograd.grad((both_ways(*inputs) * torch.ones(2, 20, 2, 8)).sum(), inputs[:5])
    actual = torch.autograd.grad(both_ways(*inputs).sum(), inputs[:5])
    assert all(map(torch.equal, actual, expected))


def test_one_input_in_several_places():
    x = torch.randn(1, 50, 2, 16, requires_grad=True)
    y = x.detach().double().requires_grad_()
    out = bidirectional_gated_linear_attention(x, x, x, -x.abs(), -x.abs(), 0.3)
    with use("reference"):
        expected = bidirectional_gated_linear_attention(y, y, y, -y.abs(), -y.abs(), 0.3)
    assert_gradients_close(gradients(out, [x]), gradients(expected, [y]))


@EACH_WAY
@pytest.mark.parametrize(("heads", "dk", "dv"), [(1, 16, 80), (3, 40, 64), (7, 8, 24)])
def test_the_same_bits_whatever_the_number_of_threads(heads, dk, dv, attention, used):
    inputs = make(1, 600, heads, dk, dv)  # large enough for several threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            outs, grads = run(attention, inputs, used)
            results.append([*outs, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("length", [32, 50])
def test_only_what_belongs_to_a_view_is_read_and_written(length):
    """Tokens beside a view are NaN: none of them comes into the result."""
    whole = make(3, length + 2, 3, 10, 12)
    views = [x[1:2, 1:-1, 1:2].detach().clone() for x in whole[:5]]
    for x, view in zip(whole, views, strict=False):
        x.detach().fill_(float("nan"))[1:2, 1:-1, 1:2] = view
    inputs = [*(x.detach()[1:2, 1:-1, 1:2].requires_grad_() for x in whole[:5]), make(1, 1, 1, 10, 12)[5]]
    compare(both_ways, inputs, (0, 1, 2, 3, 4))
    compare(one_way, inputs, (0, 1, 2, 3, 5))


@pytest.mark.long
def test_a_long_sequence_keeps_its_precision():
    inputs = make(1, 4096, 2, 32, 64, strength=1 / 16)
    compare(one_way, inputs, (0, 1, 2, 3, 5), factor=0.3)
    compare(both_ways, inputs, (0, 1, 2, 3, 4), factor=0.3)
