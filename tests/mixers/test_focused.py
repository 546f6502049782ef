"""Focused linear attention against its definition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import resample_map


def focused(**options):
    torch.manual_seed(0)
    mixer = create_mixer("focused", 12, num_heads=3, grid_size=(4, 5), **options)
    for value in mixer.parameters():
        nn.init.normal_(value, std=0.5)
    return mixer


def defined(mixer, x):
    """The definition: every query weighs every key by itself, and every head is convolved apart."""
    batch, height, width, dim = x.shape
    heads = mixer.num_heads
    q, k, v = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, dim=-1)
    k = k + resample_map(mixer.pos_embed.weight, height, width, "bilinear")

    def phi(y):
        u = (y.relu() + 1e-6) / F.softplus(mixer.scale)
        sharp = u**mixer.focus
        return u.norm(dim=-1, keepdim=True) * sharp / sharp.norm(dim=-1, keepdim=True)

    q, k, values = (each.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (phi(q), phi(k), v))
    scores = q @ k.transpose(-2, -1)
    cells = height * width
    y = (scores @ values / cells) / (scores.sum(dim=-1, keepdim=True) / cells + 1e-6)
    y = y.transpose(1, 2).reshape(batch, height, width, dim)

    def convolved(part, layer):
        size = layer.weight.shape[-1]
        out = F.conv2d(part.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=size // 2, groups=part.shape[-1])
        return out.permute(0, 2, 3, 1)

    y = y + torch.cat([convolved(head, mixer.dwc) for head in v.chunk(heads, dim=-1)], dim=-1)
    if mixer.has_lepe:
        y = y + convolved(v, mixer.conv)
    return mixer.proj(y)


@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"focus": 2, "kernel_size": 3, "qkv_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_what_the_definition_says(grid, options):
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


def test_begins_with_neither_scale_nor_positions():
    mixer = create_mixer("focused", 12)
    assert not mixer.scale.any()
    assert not mixer.pos_embed.weight.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="kernel_size=4 is even"):
        create_mixer("focused", 12, kernel_size=4)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("focused", 12, num_heads=5)
