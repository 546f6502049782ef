import importlib

import golden
import pytest
import torch
from choices import CHOICES, EACH_CHOICE, choose
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import PeakMemory
from selective_scans import assert_strides_are_read, doubles, scan_inputs
from strategies import sizes
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import dispatch, selective_scan
from visionmix.kernels.selective_scan import definition, reference
from visionmix.kernels.selective_scan.schema import Arguments, Gradients

_META, _ARRAYS = golden.load("op_selective_scan")


@EACH_CHOICE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", _META["cases"], ids=lambda case: f"case{case['case']}")
def test_golden_of_selective_scan(case, dtype, choice):
    def read(name):
        return torch.from_numpy(_ARRAYS[f"case{case['case']}_{name}"])

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    names = [name for name in names if f"case{case['case']}_{name}" in _ARRAYS]
    arguments = {name: read(name).to(dtype).requires_grad_() for name in names}
    with choose(choice):
        out, state = selective_scan(**arguments, delta_softplus=case["softplus"], return_last_state=True)
        grads = torch.autograd.grad((out * read("w").to(dtype)).sum(), list(arguments.values()))
    assert_close(out, read("out"), "out")
    assert_close(state, read("last_state"), "last_state")
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, read(f"d{name}"), f"d{name}")


@settings(max_examples=40, deadline=None)
@given(
    sizes(3, 3, 60, 4),
    st.sampled_from(["constant", "ungrouped", "1", "2"]),
    st.sampled_from(["constant", "same"]),
    st.sampled_from(["", "D", "z", "delta_bias", "D z delta_bias"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_selective_scan_equals_definition(size, B, C, options, softplus, last, choice, seed):
    batch, pairs, length, states = size
    C = B if C == "same" else C
    arguments = scan_inputs(batch, 2 * pairs, length, states, B, C, options, seed)
    expected = definition.selective_scan(**arguments, delta_softplus=softplus)
    with choose(choice):
        actual = selective_scan(**arguments, delta_softplus=softplus, return_last_state=last)
        if not last:
            actual, expected = (actual,), expected[:1]
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs)
        inputs = list(arguments.values())
        assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 30),  # before the first token there is no state to cross a gap
    st.sampled_from(["constant", "ungrouped", "2"]),
    st.sampled_from(["", "D", "z", "D z delta_bias"]),
    st.booleans(),
    st.sampled_from(CHOICES),
    st.integers(0, 9),
)
def test_gaps_against_definition(length, B, options, softplus, choice, seed):
    arguments = scan_inputs(2, 4, length, B=B, C=B, options=options, seed=seed)
    gap = torch.rand(2, 4, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gap = (gap * (gap > 0.4)).requires_grad_()
    arguments["gap"] = gap
    inputs = list(arguments.values())
    expected = definition.selective_scan(**arguments, delta_softplus=softplus)
    with choose(choice):
        actual = selective_scan(**arguments, delta_softplus=softplus, return_last_state=True)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs)
        assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


def test_gaps_are_tokens_without_input():
    """The tokens that stay see the state that the whole sequence would have brought, had the others been silent."""
    arguments = {name: x.detach() for name, x in scan_inputs(2, 4, 40, 3, B="2", C="2").items()}
    stays = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.4
    whole = selective_scan(**arguments | {"u": arguments["u"] * stays}, delta_softplus=True)
    step = torch.nn.functional.softplus(arguments["delta"] + arguments["delta_bias"][:, None])
    passed = torch.where(stays, 0, step).cumsum(-1)[..., stays]
    left = {name: x[..., stays] if name in ("u", "delta", "B", "C", "z") else x for name, x in arguments.items()}
    actual = selective_scan(**left, delta_softplus=True, gap=passed.diff(prepend=passed[..., :1]))
    assert_close(actual, whole[..., stays])
    assert not torch.allclose(selective_scan(**left, delta_softplus=True), actual, atol=1e-3)


def test_gaps_leave_triton(caplog):
    """The Triton kernels cross no gaps: the reference runs in their place, and the log says so."""
    pytest.importorskip("triton")
    module = importlib.import_module("visionmix.kernels.selective_scan.triton")
    dispatch.log_slow_path.cache_clear()
    tensors = [x.detach() for x in scan_inputs().values()]
    arguments = Arguments(*tensors, True, True, torch.rand_like(tensors[0]))
    out, state, _ = module.forward(arguments)
    assert all(map(torch.equal, (out, state), reference.forward(arguments)[:2]))
    given = Gradients(out, state, None)
    assert all(map(torch.equal, module.backward(arguments, given), reference.backward(arguments, given)))
    assert [record.message for record in caplog.records if "cross no gaps" in record.message]


@EACH_CHOICE
def test_no_gap_and_no_step(choice):
    """A gap of 0 changes nothing, and steps so small that they are 0 have finite gradients."""
    arguments = {name: x.detach().requires_grad_() for name, x in scan_inputs(1, 2, 9, dtype=torch.float32).items()}
    gap = torch.zeros(1, 2, 9, requires_grad=True)
    with choose(choice):
        expected = selective_scan(**arguments, delta_softplus=True)
        assert_close(selective_scan(**arguments, delta_softplus=True, gap=gap), expected)
        arguments["delta"].data[..., ::2] = -200
        out = selective_scan(**arguments, delta_softplus=True, gap=gap)
        assert all(torch.isfinite(grad).all() for grad in gradients((out,), [*arguments.values(), gap]))


def test_one_channel_one_token():
    arguments = scan_inputs(1, 1, 1, 1)
    assert_close(selective_scan(**arguments), definition.selective_scan(**arguments)[0])


def test_backward_in_several_parts(monkeypatch):
    """A small limit makes the backward op recompute the states chunk by chunk."""
    arguments = scan_inputs(2, 4, 50, 3, B="constant", C="2")
    inputs = list(arguments.values())
    with choose("op"):
        whole = gradients(selective_scan(**arguments), inputs)
    monkeypatch.setattr(reference, "_BACKWARD_STATES", 1)
    with choose("op"):
        assert_gradients_close(gradients(selective_scan(**arguments), inputs), whole)


def test_memory_is_bounded(monkeypatch):
    """Forward and backward together never hold the states of all tokens, half of them even."""
    batch, dim, length, states = 1, 64, 1024, 64
    arguments = [x.detach() for x in scan_inputs(batch, dim, length, states, dtype=torch.float32).values()]
    monkeypatch.setattr(reference, "_BACKWARD_STATES", batch * dim * length * states // 20)
    all_states = 4 * batch * dim * length * states
    with PeakMemory() as memory:
        out, *_ = reference.forward(Arguments(*arguments, True, False))
        reference.backward(Arguments(*arguments, True, False), Gradients(out, None, None))
    assert all_states // 20 < memory.peak < all_states // 2


def test_softplus_is_linear_above_20():
    arguments = scan_inputs(1, 2, 12, 2, options="")
    with torch.no_grad():
        arguments["delta"] += torch.tensor([19.0, 20.5])[:, None]
        arguments["A"] *= 0.01
    expected = definition.selective_scan(**arguments, delta_softplus=True)[0]
    actual = selective_scan(**arguments, delta_softplus=True)
    assert_close(actual, expected)
    inputs = list(arguments.values())
    assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("rate", [-50.0, -1e4])
def test_strong_decay(rate):
    arguments = scan_inputs(1, 2, 30, 2, dtype=torch.float32)
    with torch.no_grad():
        arguments["A"][0] = rate
    twins = doubles(arguments)
    actual, expected = selective_scan(**arguments), definition.selective_scan(**twins)[0]
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, list(arguments.values())), gradients(expected, list(twins.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_selective_scan(dtype):
    arguments = scan_inputs(2, 4, 49, 4, B="2", C="2", dtype=dtype)
    twins = doubles(arguments)
    expected, expected_state = definition.selective_scan(**twins, delta_softplus=True)
    actual, state = selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    assert actual.dtype == dtype
    assert state.dtype == torch.float32
    assert_close(actual, expected)
    assert_close(state, expected_state)
    grads = gradients(actual, list(arguments.values()))
    assert all(grad.dtype == dtype for grad in grads)
    assert_gradients_close(grads, gradients(expected, list(twins.values())))


def test_mixed_dtypes_compute_in_float32():
    """Under autocast the activations come in bfloat16, the parameters in float32."""
    arguments = scan_inputs(dtype=torch.float32)
    halves = {name: x.bfloat16() if name in ("u", "delta", "B", "C", "z") else x for name, x in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = selective_scan(**halves, delta_softplus=True)
    assert actual.dtype == torch.bfloat16
    expected = selective_scan(**{name: x.float() for name, x in halves.items()}, delta_softplus=True)
    assert torch.equal(actual, expected.bfloat16())


def test_strides_of_selective_scan():
    tokens = torch.randn(2, 30, 4, dtype=torch.float64)
    arguments = {name: x.detach() for name, x in scan_inputs(2, 4, 30, 3).items()}
    arguments["u"] = tokens.transpose(1, 2)
    arguments["delta"] = arguments["delta"][:, :1].expand(-1, 4, -1)
    arguments["A"] = -torch.rand(3, 4, dtype=torch.float64).t()
    arguments["B"] = torch.randn(2, 30, 9, dtype=torch.float64)[..., 2:5].transpose(1, 2).unsqueeze(1)
    arguments["D"] = torch.randn(8, dtype=torch.float64)[::2]
    assert_strides_are_read(selective_scan, arguments)


def test_bitwise_repeatable_of_selective_scan():
    arguments = scan_inputs(2, 8, 100, 4, B="2", C="2", dtype=torch.float32)
    inputs = list(arguments.values())
    runs = [selective_scan(**arguments) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, *(gradients(run, inputs) for run in runs)))


def test_empty_batch_of_selective_scan():
    arguments = scan_inputs(0, 4, 10, 3)
    out, state = selective_scan(**arguments, return_last_state=True)
    assert out.shape == (0, 4, 10)
    assert state.shape == (0, 4, 3)
    inputs = list(arguments.values())
    grads = gradients(out, inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    assert not grads[2].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": torch.ones(2, 4, 20, dtype=torch.int64)}, TypeError, r"u has dtype torch.int64; convert"),
        ({"A": torch.ones(4, 3, dtype=torch.cfloat)}, TypeError, r"A has dtype torch.complex64; complex"),
        ({"B": None}, TypeError, r"B is a NoneType; it must be a tensor"),
        ({"u": torch.ones(4, 20)}, ValueError, r"u has shape \(4, 20\); it must have 3 axes"),
        ({"delta": torch.ones(2, 4, 19)}, ValueError, r"delta has shape \(2, 4, 19\).*length=20"),
        ({"A": torch.ones(5, 3)}, ValueError, r"A has shape \(5, 3\).*dim=4"),
        ({"B": torch.ones(2, 4, 20)}, ValueError, r"B has shape \(2, 4, 20\).*states=3"),
        ({"B": torch.ones(2, 3, 3, 20)}, ValueError, r"B has groups=3, which does not divide dim=4"),
        ({"C": torch.ones(2, 2, 3, 20)}, ValueError, r"B has 1 groups and C has 2"),
        ({"C": torch.ones(4, 4)}, ValueError, r"C has shape \(4, 4\).*states=3"),
        ({"D": torch.ones(3)}, ValueError, r"D has shape \(3,\).*dim=4"),
        ({"z": torch.ones(2, 4)}, ValueError, r"z has shape \(2, 4\); it must have 3 axes"),
        ({"u": torch.ones(2, 4, 0)}, ValueError, r"u has shape \(2, 4, 0\); every axis"),
        ({"delta_bias": torch.ones(4, device="meta")}, ValueError, r"delta_bias is on meta, but u on cpu"),
    ],
)
def test_bad_inputs_of_selective_scan(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(scan_inputs(dtype=torch.float32) | changes))
