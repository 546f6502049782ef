"""Axial attention against its definition, and channel attention against its definition and timm's DaViT."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from timm.models.davit import ChannelAttention, ChannelAttentionV2

from visionmix import create_mixer

axial = partial(drawn_mixer, "axial", num_heads=3)
channel = partial(drawn_mixer, "channel", num_heads=3)


def one_line(layer, x):
    """The definition, on one row (batch, cells, dim)."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    weights = (torch.einsum("bihc,bjhc->bijh", q, k) * q.shape[-1] ** -0.5).softmax(dim=2)
    return layer.proj(torch.einsum("bijh,bjhc->bihc", weights, v).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (4, 1)])
def test_axial_equals_definition(grid, axis, fused):
    mixer = axial(axis=axis).double()
    x, expected = torch.randn(2, *grid, 12, dtype=torch.float64), 0
    for name, lines in (("rows", 1), ("columns", 2)):
        if axis in (name, "both"):
            layer = getattr(mixer, name)
            layer.fused_attn = fused
            expected = expected + torch.stack([one_line(layer, line) for line in x.unbind(lines)], dim=lines)
    with torch.no_grad():
        assert torch.allclose(mixer(x), expected, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_axial_in_half_precision(dtype, autocast):
    mixer, x = axial(), torch.randn(1, 9, 7, 12)
    with torch.no_grad():
        expected = mixer.double()(x.double())
        mixer = mixer.float() if autocast else mixer.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = mixer(x if autocast else x.to(dtype))
    assert (out.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (12, 9)])
@pytest.mark.parametrize(("scale", "peer"), [("head_dim", ChannelAttention), ("tokens", ChannelAttentionV2)])
def test_channel_equals_timms(scale, peer, grid, qkv_bias):
    mixer = channel(scale=scale, qkv_bias=qkv_bias).double()
    theirs = peer(12, num_heads=3, qkv_bias=qkv_bias, dtype=torch.float64)
    theirs.load_state_dict(mixer.state_dict())
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), theirs(x.flatten(1, 2)).reshape(x.shape)
    assert torch.allclose(out, expected, atol=1e-11)
    grad = torch.randn_like(out)
    for own, other in zip(*(torch.autograd.grad(y, x, grad) for y in (out, expected)), strict=True):
        assert torch.allclose(own, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", ["head_dim", "tokens"])
def test_channel_equals_definition(scale):
    mixer = channel(scale=scale).double()
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    parts = mixer.qkv(x.flatten(1, 2))[0].T.unflatten(0, (3, 3, 4))
    asks, answers, given = parts if scale == "tokens" else parts.roll(-1, 0)
    factor = 12**-0.5 if scale == "tokens" else 4**-0.5
    rows = [
        sum(
            share * given[head, other]
            for other, share in enumerate((answers[head] @ asks[head, one] * factor).softmax(0))
        )
        for head in range(3)
        for one in range(4)
    ]
    with torch.no_grad():
        assert torch.allclose(mixer(x), mixer.proj(torch.stack(rows, dim=1)).reshape(x.shape), atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channel_products_of_large_maps_stay_in_half_precisions_range(dtype, autocast):
    mixer, x = channel(), 30 * torch.randn(1, 60, 60, 12)
    mixer = mixer if autocast else mixer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = mixer(x if autocast else x.to(dtype))
    out.float().mean().backward()
    assert out.isfinite().all()
    assert all(value.grad.isfinite().all() for value in mixer.parameters())


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="axis='diagonal' is unknown; give one of 'rows', 'columns', 'both'"):
        create_mixer("axial", 12, axis="diagonal")
    with pytest.raises(ValueError, match="scale='dim' is unknown; give one of 'head_dim', 'tokens'"):
        create_mixer("channel", 12, scale="dim")
    for name in ("axial", "channel"):
        with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
            create_mixer(name, 12, num_heads=5)
