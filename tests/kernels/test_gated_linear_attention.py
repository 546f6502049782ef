import golden
import pytest
import torch
import torch.nn.functional as F
from choices import CHOICES, EACH_CHOICE, choose
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import sizes
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import bidirectional_gated_linear_attention, gated_linear_attention
from visionmix.kernels.gated_linear_attention import definition


def make(batch, length, heads, dk, dv, gates=1, seed=0, strength=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(dim):
        return torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)

    decays = [F.logsigmoid(random(dk)) * strength for _ in range(gates)]
    return [x.to(dtype).requires_grad_() for x in (random(dk), random(dk), random(dv), *decays)]


_META, _ARRAYS = golden.load("op_gla")


@EACH_CHOICE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", _META["cases"], ids=lambda case: f"case{case['case']}")
def test_golden_of_gated_linear_attention(case, dtype, choice):
    def read(name):  # heads first on file
        return torch.from_numpy(_ARRAYS[f"case{case['case']}_{name}"]).transpose(1, 2)

    q, k, v, g, w = (read(name).to(dtype) for name in "qkvgw")
    inputs = [x.requires_grad_() for x in (q, k, v, *(g.chunk(2) if case["bidirectional"] else [g]))]
    with choose(choice):
        if case["bidirectional"]:
            out = bidirectional_gated_linear_attention(*inputs)
        else:
            out, state = gated_linear_attention(*inputs)
            assert state is None
        grads = torch.autograd.grad((out * w).sum(), inputs)
    assert_close(out, read("out"), "out")
    for name, grad in zip(("dq", "dk", "dv", "dg"), (*grads[:3], torch.cat(grads[3:])), strict=True):
        assert_close(grad, read(name), name)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 63, 100])
def test_one_direction_with_states(length):
    inputs = make(2, length, 2, 3, 5)
    state = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = definition.gated_linear_attention(*inputs, 0.7, state)
    actual = gated_linear_attention(*inputs, 0.7, state, True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)
    assert_gradients_close(gradients(actual, [*inputs, state]), gradients(expected, [*inputs, state]))


@example((1, 1, 1, 2, 2), "mean", "reference", 0)
@settings(max_examples=25, deadline=None)
@given(
    sizes(3, 70, 3, 5, 5),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_both_directions(size, merge, choice, seed):
    inputs, dk = make(*size, 2, seed), size[3]
    expected = definition.bidirectional_gated_linear_attention(*inputs, dk**-0.5, merge)
    with choose(choice):
        actual = bidirectional_gated_linear_attention(*inputs, merge=merge)
        assert_close(actual, expected)
        assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


def test_a_sequence_in_two_parts_is_the_whole():
    inputs = make(1, 90, 2, 4, 4)
    whole, last = gated_linear_attention(*inputs, output_final_state=True)
    first, state = gated_linear_attention(*(x[:, :37] for x in inputs), output_final_state=True)
    second, end = gated_linear_attention(*(x[:, 37:] for x in inputs), initial_state=state, output_final_state=True)
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(end, last)


@pytest.mark.parametrize("decay", [-50.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strong_decay(decay, dtype):
    """Tokens after a strong decay keep their precision: their own decays are not differences of large sums."""
    inputs = [x.detach() for x in make(1, 80, 2, 4, 4, 2, dtype=torch.float32)]
    for gate in inputs[3:]:
        gate[:, ::7] = decay
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = definition.bidirectional_gated_linear_attention(*doubles, 0.5, "sum")
    actual = bidirectional_gated_linear_attention(*inputs, 0.5, "sum")
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, inputs), gradients(expected, doubles))


@pytest.mark.parametrize("decay", [-50.0, -1e4])
def test_strong_decay_everywhere_leaves_the_token_itself(decay):
    q, k, v = (x.detach().float() for x in make(1, 70, 1, 4, 4)[:3])
    out, _ = gated_linear_attention(q, k, v, torch.full_like(q, decay), 1.0)
    assert_close(out, (q * k).sum(-1, keepdim=True) * v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_gated_linear_attention(dtype):
    inputs = make(2, 49, 2, 8, 8, 2, strength=1 / 16, dtype=dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = definition.bidirectional_gated_linear_attention(*doubles, 8**-0.5, "mean")
    actual = bidirectional_gated_linear_attention(*inputs)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    grads = gradients(actual, inputs)
    assert all(grad.dtype == dtype for grad in grads)
    assert_gradients_close(grads, gradients(expected, doubles))


def test_mixed_dtypes_compute_in_float32_and_return_that_of_v():
    q, k, v, g = make(1, 20, 1, 4, 4, dtype=torch.float32)
    out, state = gated_linear_attention(q.bfloat16(), k, v.half(), g, output_final_state=True)
    assert out.dtype == torch.float16
    assert state.dtype == torch.float32
    expected, _ = gated_linear_attention(q.bfloat16().float(), k, v.half().float(), g)
    assert_close(out, expected)
    assert gated_linear_attention(q, k, v, g.double(), output_final_state=True)[1].dtype == torch.float64


@EACH_CHOICE
def test_autocast_leaves_the_op_in_float32(choice):
    inputs = make(2, 40, 2, 4, 4, 2, dtype=torch.float32)
    with choose(choice):
        expected = bidirectional_gated_linear_attention(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            actual = bidirectional_gated_linear_attention(*inputs)
        assert torch.equal(actual, expected)
        assert all(map(torch.equal, gradients(actual, inputs), gradients(expected, inputs)))


def test_strides_of_gated_linear_attention():
    """Permuted, sliced and expanded inputs give what their copies give, in the layout of a fresh tensor."""
    base = torch.randn(2, 3, 8, 50, dtype=torch.float64)
    q = base[..., :4, :].permute(0, 3, 1, 2)
    k = base[:1, :, 4:].expand(2, -1, -1, -1).permute(0, 3, 1, 2)
    v = torch.randn(2, 100, 3, 12, dtype=torch.float64)[:, ::2, :, 3:8]
    g = (-base.abs())[..., 2:6, :].permute(0, 3, 1, 2)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, g)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
    (actual, _), (expected, _) = gated_linear_attention(*inputs), gated_linear_attention(*copies)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    assert all(map(torch.equal, gradients(actual, inputs), gradients(expected, copies)))


def test_bitwise_repeatable_of_gated_linear_attention():
    inputs = make(2, 100, 2, 8, 8, 2, dtype=torch.float32)
    runs = [bidirectional_gated_linear_attention(*inputs) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, *(gradients(run, inputs) for run in runs)))


def test_empty_batch_of_gated_linear_attention():
    inputs = make(0, 20, 2, 4, 6)
    out, state = gated_linear_attention(*inputs, output_final_state=True)
    assert out.shape == (0, 20, 2, 6)
    assert state.shape == (0, 2, 4, 6)
    assert [grad.shape for grad in gradients(out, inputs)] == [x.shape for x in inputs]


def replaced(index, value):
    arguments = [x.detach() for x in make(2, 9, 2, 4, 6)]
    arguments[index] = value(arguments[index])
    return arguments


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, lambda x: x.int(), TypeError, r"q has dtype torch.int32; convert"),
        (1, lambda x: x.cfloat(), TypeError, r"k has dtype torch.complex64"),
        (2, lambda x: x.numpy(), TypeError, r"v is a ndarray; it must be a tensor"),
        (0, lambda x: x[0], ValueError, r"q has shape \(9, 2, 4\); it must have 4 axes"),
        (1, lambda x: x[:, 1:], ValueError, r"k has shape \(2, 8, 2, 4\).*length=9"),
        (2, lambda x: x[:1], ValueError, r"v has shape \(1, 9, 2, 6\).*batch=2"),
        (3, lambda x: x[..., :3], ValueError, r"g has shape \(2, 9, 2, 3\).*dk=4"),
        (0, lambda x: x[:, :0], ValueError, r"q has shape \(2, 0, 2, 4\); every axis"),
        (3, lambda x: x.to("meta"), ValueError, r"g is on meta, but q on cpu; move them to one device"),
    ],
)
def test_bad_inputs_of_gated_linear_attention(index, value, error, message):
    with pytest.raises(error, match=message):
        gated_linear_attention(*replaced(index, value))


def test_bad_options():
    inputs = make(2, 9, 2, 4, 6)
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2, 6, 4\).*dk=4, dv=6"):
        gated_linear_attention(*inputs, initial_state=torch.zeros(2, 2, 6, 4))
    with pytest.raises(ValueError, match=r"merge='max' is unknown; choose one of 'mean', 'sum'"):
        bidirectional_gated_linear_attention(*inputs, inputs[3], merge="max")
    with pytest.raises(ValueError, match=r"g_backward has shape"):
        bidirectional_gated_linear_attention(*inputs, inputs[3][:, :4])
