"""Norm-aware linear attention, and the normalised gate that it shares with softmax attention, against definitions."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from naive_linear_attention import convolved
from torch.nn import functional as F

from visionmix import create_mixer

norm_aware = partial(drawn_mixer, "norm_aware", num_heads=3)


def turned(x, height, width):
    """Return x (cells, dim), neighbouring channels turned as complex numbers, half of them by row, half by column."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[1] // 2
    exponents = [pair / max(count - 1, 1) for pair in range(count)]
    frequencies = torch.tensor([10000.0**-exponent for exponent in exponents], dtype=torch.float32).to(x.dtype)
    cells = [(row, column) for row in range(height) for column in range(width)]
    angles = torch.stack([torch.cat([row * frequencies, column * frequencies]) for row, column in cells])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def attended(q, k, v, height, width):
    """Return one head's values (cells, head_dim) by single weights."""
    norms = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norms))
    queries = [torch.where(sign * q > 0, sign * q / norms, 0) ** power for sign in (1, -1)]
    keys = [torch.where(sign * k > 0, sign * k, 0) ** 3 for sign in (1, -1)]
    weights = sum(turned(a, height, width) @ turned(b, height, width).T for a, b in zip(queries, keys, strict=True))
    normaliser = sum((a @ b.T).mean(dim=1, keepdim=True) for a, b in zip(queries, keys, strict=True)) + 1e-6
    return weights @ v / len(v) / normaliser


def defined(mixer, x):
    _, height, width, dim = x.shape
    q, k, v, gate = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(4, dim=-1)
    heads = torch.arange(dim).chunk(mixer.num_heads)
    out = [
        torch.cat([attended(*(each[..., head] for each in image), height, width) for head in heads], dim=-1)
        for image in zip(*(each.flatten(1, 2) for each in (q, k, v)), strict=True)
    ]
    y = torch.stack(out).reshape(x.shape) + convolved(v, mixer.lepe)
    return mixer.proj(mixer.norm(y) * gate * torch.sigmoid(gate))


@pytest.mark.parametrize("options", [{}, {"num_heads": 1, "kernel_size": 3, "qkv_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_norm_aware_equals_definition(options, grid):
    mixer = norm_aware(**options).double()
    check_definition(mixer, defined, (2, *grid, 12))


def test_queries_of_zeros_and_keys_of_zeros_attend_to_nothing():
    mixer = norm_aware()
    with torch.no_grad():
        mixer.qkv.weight[:4] = 0  # of one head's queries
        mixer.qkv.bias[:4] = 0
        mixer.qkv.weight[16:24] = 0  # of two heads' keys
        mixer.qkv.bias[16:24] = 0
    x = torch.randn(1, 3, 4, 12, requires_grad=True)
    out = mixer(x)
    _, _, v, gate = mixer.qkv(x).chunk(4, dim=-1)
    assert torch.allclose(out, mixer.proj(mixer.norm(convolved(v, mixer.lepe)) * F.silu(gate)), atol=1e-5)
    out.square().sum().backward()
    assert all(value.grad.isfinite().all() for value in (x, *mixer.parameters()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_cubes_of_large_keys(dtype, autocast):
    mixer = norm_aware()
    with torch.no_grad():
        mixer.qkv.bias[:4] = 5.0  # of one head's queries
        mixer.qkv.bias[12:16] = 60.0  # of one head's keys: their cubes are beyond float16
    check_half_precision(mixer, torch.randn(1, 20, 20, 12), defined, dtype, autocast)


def test_a_normalised_gate_of_softmax_attention():
    mixer = drawn_mixer("softmax", num_heads=3, lepe=3, gate=True, gate_norm=True).double()
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    q, k, v, gate = mixer.qkv(x).chunk(4, dim=-1)
    q, k, values = (each.flatten(1, 2).unflatten(-1, (3, 4)).transpose(1, 2) for each in (q, k, v))
    y = ((q @ k.transpose(-2, -1) / 2).softmax(dim=-1) @ values).transpose(1, 2).reshape(x.shape)
    expected = mixer.proj(mixer.norm(y + convolved(v, mixer.lepe)) * F.silu(gate))
    assert torch.allclose(mixer(x), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("norm_aware", {"kernel_size": 4}, "kernel_size=4 is even"),
        ("norm_aware", {"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ("norm_aware", {"num_heads": 2}, "num_heads=2 makes heads of 6 channels"),
        ("softmax", {"gate_norm": True}, "gate_norm=True normalises what is gated; give gate=True too"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, **options)
