import importlib.util
import logging

import pytest
import torch

from visionmix.kernels import backends, dispatch, gated_linear_attention, use

OPS = (
    "gated_linear_attention",
    "bidirectional_gated_linear_attention",
    "neighborhood_attention",
    "selective_scan",
    "selective_scan_2d",
)


@pytest.fixture
def toy():
    """An op of the dispatcher alone, with loaders set by the test; forgotten afterwards."""
    dispatch._loaders["toy"] = {"reference": lambda: dispatch.Implementation(abs, abs)}
    yield dispatch._loaders["toy"]
    del dispatch._loaders["toy"]
    dispatch._load.cache_clear()
    dispatch.log_slow_path.cache_clear()


def test_use_is_a_call_and_a_context():
    assert not dispatch.bypassed()
    with use("reference") as choice:
        assert isinstance(choice, use)
        assert dispatch.bypassed()
        with use("auto"):
            assert not dispatch.bypassed()
        assert dispatch.bypassed()
    assert not dispatch.bypassed()
    use("reference")
    assert dispatch.bypassed()
    use("auto")
    assert not dispatch.bypassed()


def test_use_restores_after_an_error():
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert not dispatch.bypassed()


def test_unknown_choice_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match=r"choice='fast'.*auto, reference, cpu, triton"):
        use("fast")
    assert not dispatch.bypassed()


def test_variable_is_validated_and_sets_the_choice(monkeypatch):
    """When the dispatcher is imported: here once more, as a module of its own."""
    spec = importlib.util.spec_from_file_location("visionmix.kernels.another_dispatch", dispatch.__file__)
    monkeypatch.setenv(dispatch.VARIABLE, "turbo")
    with pytest.raises(ValueError, match=r"^VISIONMIX_KERNELS='turbo'.*auto, reference, cpu, triton"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for choice in ("reference", "auto"):
        monkeypatch.setenv(dispatch.VARIABLE, choice)
        another = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(another)
        assert another.bypassed() == (choice == "reference")


def test_backends_lists_every_op_and_implementation():
    table = backends()
    for op in OPS:
        assert set(table[op]) == {"reference", "cpu", "triton"}
        assert table[op]["reference"] == "ready"
        assert all(table[op].values())


def test_auto_takes_the_fast_implementation(toy):
    toy["cpu"] = lambda: dispatch.Implementation(abs, abs)
    assert dispatch.resolve("toy", "auto", torch.device("cpu")) == "cpu"
    assert dispatch.resolve("toy", "auto", torch.device("cuda")) == "reference"  # no Triton kernel of this op
    assert dispatch.resolve("toy", "reference", torch.device("cpu")) == "reference"


def test_unavailable_is_logged_once_with_its_remedy(toy, caplog):
    calls = []

    def load():
        calls.append(1)
        raise dispatch.Unavailable("no compiler was found", "install g++")

    toy["cpu"] = load
    with caplog.at_level(logging.WARNING, logger="visionmix.kernels"):
        for _ in range(3):
            assert dispatch.resolve("toy", "auto", torch.device("cpu")) == "reference"
    assert len(calls) == 1
    assert len(caplog.records) == 1
    assert "no compiler was found; install g++" in caplog.text
    assert backends()["toy"]["cpu"] == "no compiler was found; install g++"
    with pytest.raises(dispatch.Unavailable, match="install g"):
        dispatch.resolve("toy", "cpu", torch.device("cpu"))


def test_missing_implementation_is_quiet_under_auto_and_refused_by_name(toy, caplog):
    with caplog.at_level(logging.DEBUG, logger="visionmix.kernels"):
        assert dispatch.resolve("toy", "auto", torch.device("cpu")) == "reference"
    assert not caplog.records
    with pytest.raises(dispatch.Unavailable, match="toy has no cpu implementation"):
        dispatch.resolve("toy", "cpu", torch.device("cpu"))


def test_implementation_of_another_device_is_refused(toy):
    toy["cpu"] = lambda: dispatch.Implementation(abs, abs)
    with use("cpu"), pytest.raises(ValueError, match=r"kernels='cpu' cannot run toy on tensors on cuda"):
        dispatch.resolve("toy", "auto", torch.device("cuda"))


def test_an_implementation_gets_the_arguments_and_runs_backward(monkeypatch):
    """The schema's arguments go in by name; backward uses the implementation of forward."""
    seen = {}
    reference = dispatch.load("gated_linear_attention", "reference")

    def forward(arguments):
        seen["forward"] = arguments._fields
        return reference.forward(arguments)

    def backward(arguments, gradients):
        seen["backward"] = gradients._fields
        assert arguments.q is not None
        return reference.backward(arguments, gradients)

    monkeypatch.setitem(
        dispatch._loaders["gated_linear_attention"], "cpu", lambda: dispatch.Implementation(forward, backward)
    )
    dispatch._load.cache_clear()
    try:
        q = torch.randn(1, 5, 2, 3, requires_grad=True)
        with use("cpu"):
            out, _ = gated_linear_attention(q, q, q, -q.abs())
        with use("auto"):
            out.sum().backward()
    finally:
        dispatch._load.cache_clear()
    fields = ("q", "k", "v", "g", "scale", "initial_state", "output_final_state", "implementation")
    assert seen == {"forward": fields, "backward": ("grad_out", "grad_state")}
