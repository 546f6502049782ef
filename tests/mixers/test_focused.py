"""Focused linear attention against its definition."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from naive_linear_attention import attended, convolved, projected
from torch.nn import functional as F

from visionmix import create_mixer

focused = partial(drawn_mixer, "focused", std=0.5, num_heads=3, grid_size=(4, 5))


def defined(mixer, x):
    """The definition: every query weighs every key by itself, and every head is convolved apart."""
    q, k, v = projected(mixer, x)

    def phi(y):
        u = (y.relu() + 1e-6) / F.softplus(mixer.scale)
        sharp = u**mixer.focus
        return u.norm(dim=-1, keepdim=True) * sharp / sharp.norm(dim=-1, keepdim=True)

    cells = x.shape[1] * x.shape[2]
    y = attended(phi(q), phi(k), v, mixer.num_heads, epsilon=1e-6 * cells).reshape(x.shape)
    y = y + convolved(v, mixer.dwc, mixer.num_heads)
    return mixer.proj(y + convolved(v, mixer.conv) if mixer.has_lepe else y)


@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"focus": 2, "kernel_size": 3, "qkv_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_focused_equals_definition(grid, options):
    mixer = focused(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_channels_without_a_positive_entry(dtype):
    mixer = focused()
    with torch.no_grad():
        mixer.qkv.bias[:8] = -50.0  # of two heads' queries
        mixer.qkv.bias[12:16] = -50.0  # and one head's keys
    x = torch.randn(1, 6, 6, 12)
    low = mixer.to(dtype)
    out = low(x.to(dtype))
    out.float().square().sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in low.parameters())
    with torch.no_grad():
        expected = defined(low.double(), x.to(dtype).double())
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_focused_begins_with_neither_scale_nor_positions():
    mixer = create_mixer("focused", 12)
    assert not mixer.scale.any()
    assert not mixer.pos_embed.weight.any()


def test_focused_refuses_heads_and_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match="kernel_size=4 is even"):
        create_mixer("focused", 12, kernel_size=4)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("focused", 12, num_heads=5)
