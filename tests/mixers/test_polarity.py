"""Polarity-aware linear attention against its definition."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from naive_linear_attention import attended, convolved
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import resample_map

polarity = partial(drawn_mixer, "polarity", std=0.5, num_heads=3, grid_size=(4, 5))


def defined(mixer, x):
    """The definition: every query weighs every key by itself, and every head is convolved apart."""
    _, height, width, _ = x.shape
    q, k, v, gate = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(4, dim=-1)
    k = k + resample_map(mixer.pos_embed.weight, height, width, "bilinear")
    scale, power = F.softplus(mixer.scale), 1 + mixer.alpha * torch.sigmoid(mixer.power)
    q, k, values = (each.unflatten(-1, (mixer.num_heads, -1)) for each in (q / scale, k / scale, v))
    q_signs, k_signs = ([each.relu() ** power, (-each).relu() ** power] for each in (q, k))
    keys = torch.cat(k_signs, dim=-1).flatten(3)
    out = []
    for signs, part in zip((q_signs, q_signs[::-1]), values.chunk(2, dim=-1), strict=True):
        queries = torch.cat(signs, dim=-1).flatten(3)
        y = attended(queries, keys, part.flatten(3), mixer.num_heads, epsilon=1e-6 * height * width)
        out.append(y.unflatten(-1, (mixer.num_heads, -1)))
    y = torch.cat(out, dim=-1).reshape(x.shape) + convolved(v, mixer.lepe, mixer.num_heads)
    return mixer.proj(y * gate)


@pytest.mark.parametrize("options", [{}, {"alpha": 0}, {"alpha": 2, "kernel_size": 3, "qkv_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_polarity_equals_definition(grid, options):
    mixer = polarity(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_gradients_equal_those_of_the_definition():
    mixer = polarity().double()
    with torch.no_grad():
        mixer.qkv.weight[:13] = 0  # channels that are 0 in every cell, of queries and of keys
        mixer.qkv.bias[:13] = 0
        mixer.pos_embed.weight[..., 0] = 0
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(x)
    grads = torch.autograd.grad(mixer(x), leaves, grad)
    expected = torch.autograd.grad(defined(mixer, x), leaves, grad)
    for own, other in zip(grads, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_the_largest_powers(dtype, autocast):
    mixer = polarity()
    with torch.no_grad():
        mixer.power += 4.0  # powers near 5
        mixer.qkv.bias[:8] = 50.0  # of two heads' queries: 50^5 is beyond float16
        mixer.qkv.bias[12:16] = -50.0  # and of one head's keys
    x = torch.randn(1, 40, 40, 12)
    check_half_precision(mixer, x, defined, dtype, autocast)


def test_polarity_begins_with_neither_scale_nor_power_nor_positions():
    mixer = create_mixer("polarity", 12)
    assert not any(value.any() for value in (mixer.scale, mixer.power, mixer.pos_embed.weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ({"num_heads": 4}, "num_heads=4 makes heads of 3 channels"),
        ({"alpha": -1}, "alpha=-1 makes powers below 1"),
    ],
)
def test_polarity_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("polarity", 12, **options)
