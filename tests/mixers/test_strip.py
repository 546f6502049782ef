"""S2AFormer: strip self-attention against the formula, and what stands before it in a block."""

import pytest
import timm
import torch
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer


def definition(mixer, x):
    """Cell by cell: scores of a head are products of two numbers."""
    smaller = x
    if mixer.sr_ratio > 1:
        side = mixer.sr_ratio
        smaller = F.pad(x, (0, 0, 0, max(0, side - x.shape[2]), 0, max(0, side - x.shape[1])))
        smaller = F.conv2d(smaller.permute(0, 3, 1, 2), mixer.sr.weight, mixer.sr.bias, stride=side)
        smaller = F.layer_norm(smaller.permute(0, 2, 3, 1), (12,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps)
    heads = mixer.num_heads
    q, (k, v) = mixer.q(x), mixer.sr_kv(smaller).flatten(1, 2).split([mixer.q.out_features, 12], -1)
    width, each = q.shape[-1] // heads, 12 // heads
    out = torch.zeros_like(x)
    for head in range(heads):
        of_head = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bhwd,bnd->bhwn", q[..., of_head], k[..., of_head]) * width**-0.5
        values = v[..., head * each : (head + 1) * each]
        out[..., head * each : (head + 1) * each] = torch.einsum("bhwn,bnd->bhwd", scores.softmax(-1), values)
    return mixer.proj(out)


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 1}, {"sr_ratio": 4, "qk_dim": 2}, {"num_heads": 4}])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 4)])
def test_strip_equals_definition(grid, options):
    mixer = drawn_mixer("strip", **options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), definition(mixer, x), atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_and_written_out_attention_agree(fused):
    mixer = drawn_mixer("strip").double()
    mixer.fused_attn = fused
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), definition(mixer, x), atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast):
    check_half_precision(drawn_mixer("strip"), torch.randn(2, 5, 6, 12), definition, dtype, autocast)


def test_queries_and_keys_have_one_channel_a_head():
    mixer = create_mixer("strip", 12, num_heads=4)
    assert (mixer.q.out_features, mixer.sr_kv.out_features) == (4, 4 + 12)
    with pytest.raises(ValueError, match="qk_dim=0 is too small; give 1 or more"):
        create_mixer("strip", 12, qk_dim=0)


def test_local_interaction_comes_before_attention():
    torch.manual_seed(0)
    block = timm.create_model("test_s2aformer").stages[1].blocks[0].eval()
    x = torch.randn(2, 6, 5, 16)
    local, linear = block.pos
    near = F.conv2d(x.permute(0, 3, 1, 2), local.conv.weight, padding=1, groups=16)
    with torch.no_grad():
        y = x + linear(F.gelu(local.norm(near)).permute(0, 2, 3, 1))
        y = y + block.mixer(block.norm1(y))
        assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-5)
