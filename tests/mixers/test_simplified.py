"""Simplified linear attention against its definition."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from naive_linear_attention import attended, convolved, projected

from visionmix import create_mixer

simplified = partial(drawn_mixer, "simplified", std=0.5, num_heads=3, grid_size=(4, 5))


def defined(mixer, x):
    """The definition: every query weighs every key by itself, and every head is convolved apart."""
    q, k, v = projected(mixer, x)
    y = attended(q.relu(), k.relu(), v, mixer.num_heads, epsilon=1e-6).reshape(x.shape)
    if hasattr(mixer, "conv"):
        y = y + convolved(v, mixer.conv)
    return mixer.proj(y + convolved(v, mixer.lepe, mixer.num_heads))


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "qkv_bias": False}, {"lepe": True}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_simplified_equals_definition(grid, options):
    mixer = simplified(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_scores_near_the_smallest_normaliser():
    mixer = simplified().double()
    with torch.no_grad():
        mixer.qkv.weight[:24] *= 1e-4  # scores of about 1e-8, to which 1e-6 is added
        mixer.qkv.bias[:24] *= 1e-4
        mixer.pos_embed.weight.zero_()
        x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_channels_without_a_positive_entry(dtype, autocast):
    mixer = simplified()
    with torch.no_grad():
        mixer.qkv.bias[:8] = -50.0  # of two heads' queries
        mixer.qkv.bias[8:12] = 50.0
        mixer.qkv.bias[12:16] = -50.0  # and of one head's keys
        mixer.qkv.bias[20:23] = -50.0  # and three channels' of the head with large queries
    x = torch.randn(1, 40, 40, 12)
    check_half_precision(mixer, x, defined, dtype, autocast)


def test_simplified_begins_without_positions():
    assert not create_mixer("simplified", 12).pos_embed.weight.any()


def test_simplified_refuses_heads_and_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match="kernel_size=4 is even"):
        create_mixer("simplified", 12, kernel_size=4)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("simplified", 12, num_heads=5)
