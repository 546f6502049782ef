"""The skeleton of parallel resolutions: what its maps exchange, its options, and the maps that it gives."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from visionmix.backbones import Parallel
from visionmix.backbones.parallel import Merge

SMALL = {
    "img_size": 64,
    "num_classes": 10,
    "mixer": "conv",
    "embed_dims": (8, 12, 16),
    "num_exchanges": (1, 2),
    "depths": (1, 2),
    "stem_dim": 16,
    "neck_dims": (8, 12, 16, 20),
}


def images(height=64, width=96, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def seeded(**options):
    torch.manual_seed(0)
    return Parallel(**SMALL | options).eval()


def conv_norms(path: nn.Sequential) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    convs = [layer for layer in path if isinstance(layer, nn.Conv2d)]
    return list(zip(convs, (layer for layer in path if isinstance(layer, nn.BatchNorm2d)), strict=True))


@pytest.mark.parametrize("sizes", [((8, 12), (4, 6), (2, 3)), ((9, 5), (5, 3), (3, 2))])
def test_merges_equal_their_definition(sizes):
    dims = (4, 6, 8)
    maps = [torch.randn(2, dim, *size, dtype=torch.float64) for dim, size in zip(dims, sizes, strict=True)]
    for target in range(3):
        merge = Merge(dims, target, dtype=torch.float64).eval()
        for norm in (module for module in merge.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean)
            nn.init.normal_(norm.bias)
        expected = maps[target]
        for source, path in enumerate(merge.down):
            x, layers = maps[source], conv_norms(path)
            for number, (conv, norm) in enumerate(layers):
                assert conv.groups == (1 if number % 2 else dims[source])
                x = norm(F.conv2d(x, conv.weight, stride=1 if number % 2 else 2, padding=0 if number % 2 else 1,
                                  groups=conv.groups))  # fmt: skip
                x = x.relu() if number % 2 and number + 1 < len(layers) else x
            assert len(layers) == 2 * (target - source)
            expected = expected + x
        for number, path in enumerate(merge.up):
            ((conv, norm),) = conv_norms(path)
            x = norm(F.conv2d(maps[target + 1 + number], conv.weight))
            x = F.interpolate(x, scale_factor=2 ** (number + 1), mode="bilinear", align_corners=False)
            expected = expected + F.interpolate(x, size=sizes[target], mode="bilinear", align_corners=False)
        out = merge([x.permute(0, 2, 3, 1) for x in maps]).permute(0, 3, 1, 2)
        assert torch.allclose(out, expected.relu(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (33, 7), (225, 193)])
def test_maps_of_any_image(size):
    model = seeded()
    maps = model.forward_maps(images(*size))
    for each, dim, info in zip(maps, SMALL["embed_dims"], model.feature_info, strict=True):
        assert each.shape == (1, *(-(-side // info["reduction"]) for side in size), dim)
    assert model(images(*size)).shape == (1, 10)


def test_blocks_of_a_resolution_and_the_rates_of_stochastic_depth():
    model = seeded(mixer=["conv", "softmax", "mala"], drop_path_rate=0.4, mlp_layer=["mlp", None, "conv_mlp"])
    exchanges = [exchange for stage in model.stages for exchange in stage.exchanges]
    assert [[len(blocks) for blocks in each.branches] for each in exchanges] == [[1, 1], [2, 2, 2], [2, 2, 2]]
    for exchange in exchanges:
        kinds = [{type(block.mixer).__name__ for block in blocks} for blocks in exchange.branches]
        assert kinds == [{"DepthwiseConv"}, {"SoftmaxAttention"}, {"MagnitudeAwareLinearAttention"}][: len(kinds)]
        assert not exchange.branches[1][0].has_mlp
    rates = [getattr(block.scale1.drop_path, "drop_prob", 0.0) for each in exchanges for block in each.branches[1]]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert torch.jit.script(model)(images()).shape == (1, 10)


@pytest.mark.parametrize(("options", "message"), [
    ({"mixer": ["conv"] * 2}, "mixer has 2 entries for 3 resolutions; give one per resolution"),
    ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\) do not fit; give two resolutions or more"),
    ({"num_exchanges": (1,)}, r"num_exchanges=\(1,\) and depths=\(1, 2\) do not fit"),
    ({"neck_dims": (8, 12, 16)}, r"neck_dims=\(8, 12, 16\)"),
    ({"embed_dims": (8,), "num_exchanges": (), "depths": (), "neck_dims": (8, 8)}, "give two resolutions or more"),
    ({"patch_size": 8}, "patch_size=8 does not suit two convolutions of stride 2; give 4"),
    ({"stem_dim": 18}, "out_dim=18 has no quarter"),
    ({"img_size": 3}, "img_size=3 is smaller than patch_size=4"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**SMALL | options)


@pytest.mark.parametrize("neck", [False, True])
@pytest.mark.parametrize("indices", [(0,), (0, 2), (1, 2)])
def test_all_parameters_of_a_pyramid_are_used(indices, neck):
    """Distributed training refuses others."""
    torch.manual_seed(0)
    whole = timm.create_model("test_hrvmamba", neck_features=neck).eval()
    features = timm.create_model("test_hrvmamba", neck_features=neck, features_only=True, out_indices=indices).eval()
    assert not features.model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    maps = features(images())
    expected = whole.forward_intermediates(images(), indices=list(indices), intermediates_only=True)
    assert features.feature_info.channels() == [each.shape[1] for each in maps]
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))
    sum(each.sum() for each in maps).backward()
    assert [key for key, value in features.named_parameters() if value.grad is None] == []


def test_the_necks_sums_as_a_pyramid():
    model = seeded(neck_features=True)
    assert all(model.get_submodule(info["module"]) for info in model.feature_info)
    last, maps = model.forward_intermediates(images(33, 7))
    assert torch.equal(last, model.forward_features(images(33, 7)))
    assert torch.equal(maps[-1], last.permute(0, 3, 1, 2))
    assert [each.shape[1] for each in maps] == [info["num_chs"] for info in model.feature_info]
    wide = [layer(each) for layer, each in zip(model.neck.widen, model.forward_maps(images(33, 7)), strict=True)]
    second = model.neck.down[0](wide[0]) + wide[1]
    assert torch.equal(maps[0], wide[0].permute(0, 3, 1, 2))
    assert torch.equal(maps[1], second.permute(0, 3, 1, 2))


def test_a_new_size_reaches_every_resolution():
    model = seeded(mixer={"name": "cross_window", "split_size": 2})
    grids = []

    def note(grid_size):
        grids.append(grid_size)

    for stage in model.stages:
        for exchange in stage.exchanges:
            for blocks in exchange.branches:
                blocks[0].set_grid_size = note
    model.set_input_size((72, 100))
    finest, second, third = (18, 25), (9, 13), (5, 7)
    assert grids == [finest, second, *[finest, second, third] * 2]
