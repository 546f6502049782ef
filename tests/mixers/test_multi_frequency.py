"""FMViT: convolutions of several groups that become one, and the mixers made from them."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers.multi_group import MapConv, MultiGroupConv


def drawn(module):
    """Return `module` in float64 and eval mode, with batch norms that do something."""
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.normal_(each.running_mean, std=0.5)
            nn.init.uniform_(each.running_var, 0.5, 2.0)
            nn.init.normal_(each.weight, 1.0, 0.3)
            nn.init.normal_(each.bias, std=0.5)
    return module.double().eval()


def summed(layer, x):
    """The sum of the branches, group by group, in NCHW."""
    x = x.permute(0, 3, 1, 2)
    out = 0 if layer.identity is None else layer.identity(x)
    for conv, norm in zip(layer.convs, layer.norms, strict=True):
        parts = zip(x.chunk(conv.groups, 1), conv.weight.chunk(conv.groups), strict=True)
        out = out + norm(torch.cat([F.conv2d(a, b, padding=conv.padding) for a, b in parts], 1))
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("dims", "kernel_size", "groups", "kind"),
    [
        ((8, 8), 1, (1, 2, 4), nn.Linear),
        ((8, 12), 1, (1, 2, 4), nn.Linear),
        ((16, 16), 3, (2, 4, 8), MapConv),
        ((16, 8), 3, (4, 8), MapConv),
        ((6, 6), 3, (8, 16), MapConv),  # of two groups, which 8 and 16 both become
        ((5, 5), 1, (4, 8), nn.Linear),
    ],
)
def test_the_sum_becomes_one_layer(dims, kernel_size, groups, kind):
    torch.manual_seed(0)
    layer = drawn(MultiGroupConv(*dims, kernel_size, groups))
    fused, x = layer.fuse(), torch.randn(2, 4, 5, dims[0], dtype=torch.float64)
    assert type(fused) is kind
    with torch.no_grad():
        assert torch.allclose(layer(x), summed(layer, x), atol=1e-12)
        assert torch.allclose(fused(x), layer(x), atol=1e-12)
    assert sum(value.numel() for value in fused.parameters()) < sum(value.numel() for value in layer.parameters())


def test_several_numbers_of_groups_are_branches():
    assert [conv.groups for conv in MultiGroupConv(8, 8, groups=(1, 2, 4)).convs] == [1, 2, 4]
    assert [conv.groups for conv in MultiGroupConv(6, 6, groups=(4, 8)).convs] == [2]


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 1}, {"high": 0.5, "sr_ratio": 3, "num_heads": 2}])
@pytest.mark.parametrize("grid", [(1, 1), (6, 9)])
def test_multi_frequency_equals_definition(grid, options):
    torch.manual_seed(0)
    mixer = drawn(create_mixer("multi_frequency", 12, **options))
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    above = int(12 * options.get("high", 0.25))
    high, low = x[..., :above], x[..., above:]
    smaller = [-(-side // mixer.sr_ratio) for side in grid]
    pooled = F.adaptive_avg_pool2d(low.permute(0, 3, 1, 2), smaller)
    with torch.no_grad():
        q, kv = summed(mixer.q, low).flatten(1, 2), summed(mixer.kv, pooled.permute(0, 2, 3, 1)).flatten(1, 2)
        out = []
        heads = mixer.num_heads
        for a, b, c in zip(*(each.chunk(heads, -1) for each in (q, *kv.chunk(2, -1))), strict=True):
            out.append(torch.softmax(a @ b.transpose(1, 2) * a.shape[-1] ** -0.5, -1) @ c)
        mixed = torch.cat([F.relu(summed(mixer.conv, high)), torch.cat(out, -1).unflatten(1, grid)], -1)
        assert torch.allclose(mixer(x), summed(mixer.proj, mixed), atol=1e-12)


def test_multi_group_equals_definition():
    mixer, x = drawn(create_mixer("multi_group", 16)), torch.randn(2, 4, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), summed(mixer.proj, F.relu(summed(mixer.conv, x))), atol=1e-12)


def test_a_reparameterised_model_has_no_norm_but_the_last_and_computes_the_same():
    torch.manual_seed(0)
    model = drawn(timm.create_model("test_fmvit"))
    images = torch.randn(2, 3, 71, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        model.reparameterize()
        assert torch.allclose(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d | MultiGroupConv) for module in model.modules())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="kernel_size=2 is even"):
        create_mixer("multi_group", 12, kernel_size=2)
    with pytest.raises(ValueError, match=r"groups=\(2, 3\) are not multiples of the first"):
        MultiGroupConv(12, 12, groups=(2, 3))
    with pytest.raises(ValueError, match="sr_ratio=0 is too small; give 1 or more"):
        create_mixer("multi_frequency", 12, sr_ratio=0)
    with pytest.raises(ValueError, match="high=0 makes 0 of 12 channels"):
        create_mixer("multi_frequency", 12, high=0)
    with pytest.raises(ValueError, match="num_heads=4 does not divide the 9 channels of low frequencies"):
        create_mixer("multi_frequency", 12, num_heads=4)
    with pytest.raises(ValueError, match="patch_size=8 does not suit two convolutions of stride 2; give 4"):
        timm.create_model("test_fmvit", patch_size=8)
