"""Mixers of frequencies against their definitions: DCT attention and Orchid's convolution."""

import cmath
import math
from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

dct = partial(drawn_mixer, "dct", num_heads=3)
orchid = partial(drawn_mixer, "orchid")


def cosine(frequency, place, count):
    return (1 if frequency else 0.5**0.5) * (2 / count) ** 0.5 * math.cos(math.pi * (place + 0.5) * frequency / count)


def defined_dct(mixer, x):
    _, height, width, _ = x.shape
    kept = [(a, b) for a in range(-(-height // mixer.reduction)) for b in range(-(-width // mixer.reduction))]
    cells = [(r, c) for r in range(height) for c in range(width)]
    waves = [[cosine(a, r, height) * cosine(b, c, width) for r, c in cells] for a, b in kept]
    waves = torch.tensor(waves, dtype=x.dtype)
    q, k, v = mixer.qkv(waves @ x.flatten(1, 2)).unflatten(-1, (3, mixer.num_heads, -1)).unbind(2)
    weights = (torch.einsum("bihc,bjhc->bijh", q, k) * q.shape[-1] ** -0.5).softmax(dim=2)
    y = torch.einsum("bijh,bjhc->bihc", weights, v).flatten(2)
    return mixer.proj(waves.T @ y).reshape(x.shape)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reduction", [1, 2, 3])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 1)])
def test_dct_equals_definition(grid, reduction, fused):
    mixer = dct(reduction=reduction).double()
    mixer.fused_attn = fused
    check_definition(mixer, defined_dct, (2, *grid, 12), rtol=1e-7)


def test_without_attention_all_frequencies_make_the_map():
    mixer = dct(reduction=1).double()
    with torch.no_grad():
        for layer in (mixer.qkv, mixer.proj):
            layer.weight.copy_(torch.eye(12).repeat(len(layer.weight) // 12, 1))
            layer.bias.zero_()
        mixer.qkv.weight[:12] *= 1e6  # each frequency sees itself alone, or its like
        x = torch.randn(1, 4, 6, 12, dtype=torch.float64)
        x = x * 100 / x.norm()
        assert (mixer(x) - x).norm() < x.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dct_in_half_precision(dtype, autocast):
    check_half_precision(dct(std=0.1), torch.randn(1, 9, 12, 12), defined_dct, dtype, autocast)


def transform(x):
    """The definition of F: (batch, dim, height, width) to complex numbers of the same shape."""
    height, width = x.shape[2:]

    def waves(count):
        rows = [[cmath.exp(-2j * math.pi * a * b / count) / count**0.5 for a in range(count)] for b in range(count)]
        return torch.tensor(rows, dtype=torch.complex128)

    return waves(height) @ x.to(torch.complex128) @ waves(width)


def inverse(x):
    return transform(x.conj()).conj().real


def wrapped(layer, x):
    reach = layer.weight.shape[-1] // 2
    rows, columns = (torch.arange(-reach, n + reach) % n for n in x.shape[2:])
    return F.conv2d(x[:, :, rows][:, :, :, columns], layer.weight, layer.bias, groups=layer.groups)


def defined_orchid(mixer, x):
    v, gate = wrapped(mixer.conv, mixer.in_proj(x).permute(0, 3, 1, 2)).chunk(2, dim=1)
    spectra = transform(wrapped(mixer.condition, v))
    if mixer.correlates:
        spectrum = spectra[:, 0::2].conj() * spectra[:, 1::2]
    else:
        spectrum = (spectra.real.square() + spectra.imag.square()).sqrt()
    y = inverse(spectrum * transform(v)) + wrapped(mixer.local, v)
    return mixer.proj((gate * y).permute(0, 2, 3, 1))


@pytest.mark.parametrize("kernel", ["magnitude", "correlation"])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (6, 5)])
def test_orchid_equals_definition(grid, kernel):
    mixer = orchid(kernel=kernel).double()
    check_definition(mixer, defined_orchid, (2, *grid, 12), rtol=1e-7)


@pytest.mark.parametrize("kernel", ["magnitude", "correlation"])
def test_orchid_shifts_with_its_map(kernel):
    mixer = orchid(kernel=kernel, kernel_size=5).double()
    x = torch.randn(1, 6, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x.roll((2, 3), (1, 2))), mixer(x).roll((2, 3), (1, 2)), atol=1e-12)


def test_correlation_is_a_correlation():
    """The kernel at an offset is the sum of products of both convolutions' cells that far apart."""
    mixer = orchid(kernel="correlation").double()
    v = torch.randn(1, 12, 4, 5, dtype=torch.float64)
    a, b = wrapped(mixer.condition, v).unflatten(1, (12, 2)).unbind(2)
    kernel = torch.stack(
        [torch.stack([(a * b.roll((-r, -c), (2, 3))).sum((2, 3)) for c in range(5)], dim=-1) for r in range(4)], dim=-2
    )
    spectra = transform(wrapped(mixer.condition, v))
    assert torch.allclose(inverse(spectra[:, 0::2].conj() * spectra[:, 1::2]) * 20**0.5, kernel, atol=1e-10)


@pytest.mark.parametrize("kernel", ["magnitude", "correlation"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orchid_in_half_precision(dtype, autocast, kernel):
    check_half_precision(orchid(kernel=kernel), 3 * torch.randn(1, 9, 12, 12), defined_orchid, dtype, autocast)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dct", {"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ("dct", {"reduction": 0}, "reduction=0 is too small"),
        ("orchid", {"kernel": "phase"}, "kernel='phase' is unknown; give one of 'magnitude', 'correlation'"),
        ("orchid", {"kernel_size": 2}, "kernel_size=2 is even"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, **options)
