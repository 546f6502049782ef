"""DualToken-ViT: its mixer against the formula, and the tokens' way through a model."""

import pytest
import timm
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer


def definition(mixer, x, tokens):
    """In NCHW, head by head."""
    summary = x.permute(0, 3, 1, 2)
    for conv in mixer.convs:
        half = [-(-side // 2) for side in summary.shape[2:]]
        summary = F.adaptive_avg_pool2d(summary + conv(summary), half)
    summary = F.adaptive_avg_pool2d(summary, mixer.side).flatten(2).transpose(1, 2)
    heads, dim = mixer.num_heads, x.shape[3]

    def attend(q, k, v):
        out = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            out.append(torch.softmax(a @ b.transpose(1, 2) * (dim // heads) ** -0.5, -1) @ c)
        return torch.cat(out, -1)

    summary = mixer.attn.proj(attend(*mixer.attn.qkv(summary).chunk(3, -1)))
    enriched = tokens + mixer.mlp(F.layer_norm(tokens, (dim,), mixer.mlp_norm.weight, mixer.mlp_norm.bias, 1e-6))
    tokens = mixer.share * summary + (1 - mixer.share) * enriched
    normed = F.layer_norm(tokens, (dim,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    out = mixer.proj(attend(mixer.q(x).flatten(1, 2), *mixer.kv(normed).chunk(2, -1)))
    return out.unflatten(1, x.shape[1:3]), tokens


@pytest.mark.parametrize("options", [{}, {"steps": 0}, {"steps": 2, "side": 2}, {"share": 0.2, "num_heads": 4}])
@pytest.mark.parametrize("grid", [(8, 12), (5, 3), (1, 1)])
def test_dual_token_equals_definition(grid, options):
    mixer = drawn_mixer("dual_token", **{"side": 3} | options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    tokens = torch.randn(2, mixer.side**2, 12, dtype=torch.float64)
    with torch.no_grad():
        for ours, expected in zip(mixer.with_tokens(x, tokens), definition(mixer, x, tokens), strict=True):
            assert torch.allclose(ours, expected, atol=1e-12)
        assert torch.allclose(mixer(x), definition(mixer, x, torch.zeros_like(tokens))[0], atol=1e-12)


def test_tokens_of_one_stage_reach_the_next():
    model = timm.create_model("test_dualtoken_vit").eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = model(x)
        torch.nn.init.normal_(model.stages[0].global_tokens)
        assert not torch.allclose(model(x), before, atol=1e-5)
        carry = []
        after = model.stages[0](model.stem(x), carry)
        assert [each.shape for each in carry] == [(1, 49, 16)]
        model.stages[1](after, carry)
        assert [each.shape for each in carry] == [(1, 49, 32)]


def test_merging_adds_the_largest_cell_of_each_patch():
    layer = timm.create_model("test_dualtoken_vit").stages[1].downsample
    for size in ((4, 6), (5, 3)):
        x = torch.randn(2, *size, 16)
        padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2)).permute(0, 3, 1, 2)
        largest = F.max_pool2d(padded, 2).permute(0, 2, 3, 1)
        assert torch.allclose(layer(x), layer.merge(x) + layer.shortcut(largest), atol=1e-6)


def test_the_bi_dimensional_gate_of_a_feed_forward():
    torch.manual_seed(0)
    layer = timm.create_model("test_dualtoken_vit").stages[0].blocks[0].mlp.double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    y = layer.mlp(x)
    normed = layer.norm(y)
    for n in range(2):
        means = F.gelu(layer.global_reduce(normed[n].mean((0, 1))))
        for row in range(3):
            for column in range(5):
                both = torch.cat([F.gelu(layer.local_reduce(normed[n, row, column])), means])
                gate = torch.sigmoid(layer.channel_select(means)) * torch.sigmoid(layer.cell_select(both))
                assert torch.allclose(layer(x)[n, row, column], gate * y[n, row, column], atol=1e-12)


@pytest.mark.parametrize(("name", "gmacs"), [("dualtoken_vit_mini", 0.5), ("dualtoken_vit_small", 1.0)])
def test_models_have_the_operations_that_the_abstract_prints(name, gmacs):
    with torch.device("meta"):
        model, x = timm.create_model(name).eval(), torch.empty(1, 3, 224, 224)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(x)
    assert abs(counter.get_total_flops() / 2e9 - gmacs) <= 0.05 * gmacs


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="steps=-1 is negative; give 0 or more"):
        create_mixer("dual_token", 12, steps=-1)
    with pytest.raises(ValueError, match="side=0 is too small; give 1 or more"):
        create_mixer("dual_token", 12, side=0)
    with pytest.raises(ValueError, match=r"share=1.5 is no share; give a number from 0 to 1"):
        create_mixer("dual_token", 12, share=1.5)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("dual_token", 12, num_heads=5)
    with pytest.raises(ValueError, match="patch_size=4 does not suit three convolutions of stride 2; give 8"):
        timm.create_model("test_dualtoken_vit", patch_size=4)
