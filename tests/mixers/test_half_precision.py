"""Mixers in half precision against float64, for inputs small and large."""

import math

import pytest
import torch

import visionmix
from visionmix.mixers.registry import mixer_options

SCANS = [name for name in visionmix.list_mixers() if "order" in mixer_options(name)]
LINEAR = ["agent", "dual_gated", "flow", "focused", "generalized_linear", "inline", "linear", "linear_global", "mala"]
LINEAR += ["non_causal_ssd", "norm_aware", "rala", "recurrent_wkv", "scattered", "shift_add"]
HALVES = [torch.float16, torch.bfloat16]


def bound(name, deviation):
    """Return the units of the last place that a scan may be off by.

    The offsets of a deformable convolution grow with its input, so that rounding a large one moves a tap by parts of a
    cell, in a map of noise to another value; the error of a softmax grows with its scores. Such results are only held
    to be finite.
    """
    return math.inf if deviation > {"deformable_scan": 1, "lightnet": 30}.get(name, math.inf) else 5


def build(name, dim=32):
    torch.manual_seed(0)
    options = {"num_heads": 2} if "num_heads" in mixer_options(name) else {}
    return visionmix.create_mixer(name, dim, **options).eval()


def inputs(deviation, dim=32):
    return deviation * torch.randn(2, 9, 12, dim, generator=torch.Generator().manual_seed(1))


def compare(out, expected, dtype, most):
    """Hold `out` to be finite wherever `expected` fits, and to `most` units of the last place of `dtype`.

    Units count where most of `expected` fits: scans without a norm behind them grow as a power of their inputs.
    """
    fits = expected.abs().amax(dim=-1) < torch.finfo(dtype).max
    assert out.isfinite().all(dim=-1)[fits].all()
    if fits.float().mean() < 0.5:
        return
    error = (out.double() - expected)[fits].norm() / expected[fits].norm()
    assert error <= most * torch.finfo(dtype).eps


@pytest.mark.parametrize("deviation", [1, 30, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SCANS)
def test_scan_under_autocast(name, dtype, deviation):
    x = inputs(deviation)
    with torch.no_grad():
        expected = build(name).double()(x.double())
        with torch.autocast("cpu", dtype):
            compare(build(name)(x), expected, dtype, bound(name, deviation))


@pytest.mark.parametrize("deviation", [1, 30, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SCANS)
def test_scan_of_a_half_model(name, dtype, deviation):
    mixer, x = build(name).to(dtype), inputs(deviation).to(dtype)
    with torch.no_grad():
        out = mixer(x)
        assert out.dtype == dtype
        compare(out, mixer.double()(x.double()), dtype, bound(name, deviation))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        (name, deviation)
        for name in LINEAR
        for deviation in (1, 30)
        if name != "agent" and (name, deviation) != ("rala", 30)
    ],
)
def test_linear_attention_in_half_precision(name, deviation, dtype):
    mixer, x = build(name), inputs(deviation).to(dtype)
    with torch.no_grad():
        expected = build(name).double()(x.double())
        with torch.autocast("cpu", dtype):
            compare(mixer(x.float()), expected, dtype, 5)
        mixer = mixer.to(dtype)
        compare(mixer(x), build(name).to(dtype).double()(x.double()), dtype, 5)


@pytest.mark.parametrize("half", [False, True])
def test_rala_overflows_only_where_its_result_does(half):
    """Its error grows with its scores, as that of any softmax; its products stay in range."""
    mixer, x = build("rala"), inputs(30).half()
    with torch.no_grad():
        expected = build("rala").double()(x.double())
        fits = expected.abs().amax(dim=-1) < torch.finfo(torch.float16).max / 2
        assert fits.float().mean() > 0.5
        with torch.autocast("cpu", torch.float16, enabled=not half):
            out = mixer.half()(x) if half else mixer(x.float())
    assert out.isfinite().all(dim=-1)[fits].all()


@pytest.mark.parametrize("name", SCANS + LINEAR)
def test_half_model_trains_on_large_inputs(name):
    mixer, x = build(name).half(), inputs(10).half().requires_grad_()
    mixer(x).float().mean().backward()
    assert x.grad.isfinite().all()
    assert all(value.grad.isfinite().all() for value in mixer.parameters())
