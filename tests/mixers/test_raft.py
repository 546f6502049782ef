"""Raft token mixing against its definition, and the patches of several sizes before it."""

import golden
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visionmix
from visionmix.layers import MultiScalePatches
from visionmix.models import load_checkpoint


def mixed(mixer, x):
    """Return what the MLP makes of every column of x (batch, rows, columns, channels), or of every row."""
    x = x if mixer.vertical else x.transpose(1, 2)
    out = torch.zeros_like(x)
    groups = x.shape[3] // mixer.raft_size
    for other in range(x.shape[2]):
        for channel in range(groups):
            raft = [raft * groups + channel for raft in range(mixer.raft_size)]
            vector = torch.cat([x[:, :, other, each] for each in raft], dim=1)
            vector = F.gelu(vector @ mixer.mlp.fc1.weight.T + mixer.mlp.fc1.bias)
            vector = vector @ mixer.mlp.fc2.weight.T + mixer.mlp.fc2.bias
            for each, part in zip(raft, vector.chunk(mixer.raft_size, dim=1), strict=True):
                out[:, :, other, each] = part
    return out if mixer.vertical else out.transpose(1, 2)


@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
@pytest.mark.parametrize(("raft_size", "mlp_ratio"), [(1, 1.5), (2, 2.0), (3, 2.0), (6, 1.0)])
def test_raft_equals_definition(axis, raft_size, mlp_ratio):
    torch.manual_seed(0)
    options = {"axis": axis, "raft_size": raft_size, "mlp_ratio": mlp_ratio, "grid_size": (4, 5)}
    mixer = visionmix.create_mixer("raft", 6, **options, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert torch.allclose(mixer(x), mixed(mixer, x), atol=1e-12)
    small = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    fitted = F.interpolate(small.permute(0, 3, 1, 2), (4, 5), mode="bicubic").permute(0, 2, 3, 1)
    back = F.interpolate(mixed(mixer, fitted).permute(0, 3, 1, 2), (3, 7), mode="bicubic").permute(0, 2, 3, 1)
    assert torch.allclose(mixer(small), back, atol=1e-12)


@pytest.mark.parametrize(("options", "message"), [
    ({"axis": "diagonal"}, "axis='diagonal' is unknown"),
    ({"raft_size": 4}, "raft_size=4 does not divide dim=6"),
    ({"raft_size": 0}, "raft_size=0 does not divide dim=6"),
])  # fmt: skip
def test_raft_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        visionmix.create_mixer("raft", 6, **options)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(("stride", "scales"), [(2, (1,)), (2, (1, 2)), (4, (1, 2, 3)), (3, (1, 3))])
@pytest.mark.parametrize("size", [(12, 24), (13, 10), (1, 5)])
def test_patches_of_several_sizes_are_one_linear_map_of_all_pixels(size, stride, scales, images):
    torch.manual_seed(0)
    layer = MultiScalePatches(3, 5, stride, scales=scales, images=images, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = layer.grid_size(*size)
    whole = F.interpolate(x, (rows * stride, columns * stride), mode="bicubic")
    pixels = [
        F.unfold(whole, stride * scale, stride=stride, padding=(scale - 1) * stride // 2).unflatten(1, (3, -1))
        for scale in scales
    ]
    pixels = torch.cat(pixels, dim=2).flatten(1, 2)
    expected = (layer.weight.flatten(1) @ pixels + layer.bias[:, None]).unflatten(2, (rows, columns))
    given = x if images else x.permute(0, 2, 3, 1)
    assert torch.allclose(layer(given), expected.permute(0, 2, 3, 1), atol=1e-12)


@pytest.mark.parametrize(("stride", "scales", "message"), [
    (2, (), "do not rise from 1"), (2, (2, 4), "do not rise from 1"), (2, (1, 4, 2), "do not rise from 1"),
    (2, (1, 1), "do not rise from 1"), (3, (1, 2), "no common centre"),
])  # fmt: skip
def test_patches_without_a_common_centre_are_refused(stride, scales, message):
    with pytest.raises(ValueError, match=message):
        MultiScalePatches(3, 5, stride, scales=scales)


def test_patches_begin_as_a_linear_layer_does():
    torch.manual_seed(0)
    layer, like = MultiScalePatches(8, 64, 4), nn.Linear(8 * 80, 64)
    for ours, theirs in ((layer.weight, like.weight), (layer.bias, like.bias)):
        assert ours.abs().max() <= 640**-0.5
        assert torch.allclose(ours.std(), theirs.std(), rtol=0.2)


@pytest.fixture(scope="module")
def tensors():
    return golden.state_dict(golden.load("raftmlp_s")[0])


def loaded(tensors, **options):
    model = timm.create_model("raftmlp_s", **options).eval()
    load_checkpoint(model, tensors)
    return model


def test_patches_load_weights_for_grey_images(tensors):
    grey = golden.image(64, 96, channels=1)
    with torch.no_grad():
        expected = loaded(tensors)(grey.expand(-1, 3, -1, -1))
        assert torch.allclose(loaded(tensors, in_chans=1)(grey), expected, atol=1e-5)


@pytest.mark.parametrize("in_chans", [2, 5])
def test_patches_load_weights_for_other_channels(tensors, in_chans):
    """They are the published ones in turn, and the sum over them stays, in patches of either size."""
    small, large = tensors["levels.0.fn.0.fc.weight"].split([3 * 16, 3 * 64], dim=1)
    weight = torch.cat([small.unflatten(1, (3, 16)), large.unflatten(1, (3, 64))], dim=2)
    expected = weight[:, [each % 3 for each in range(in_chans)]] * 3 / in_chans
    assert torch.allclose(loaded(tensors, in_chans=in_chans).stem.weight, expected)


def test_raftmlp_loads_at_another_size(tensors):
    natural, later = loaded(tensors), loaded(tensors)
    built = loaded(tensors, img_size=(96, 130))
    later.set_input_size((96, 130))
    image = golden.image(96, 130)
    with torch.no_grad():
        assert torch.equal(natural(image), built(image))
        assert torch.equal(natural(image), later(image))


def test_raft_block_takes_other_mixers_and_lists_of_grids():
    with pytest.raises(ValueError, match="has no option axis='vertical'"):
        timm.create_model("test_raftmlp", mixer="conv")
    grids = [{"name": "raft", "grid_size": (side, 2 * side)} for side in (16, 8, 4, 2)]
    model = timm.create_model("test_raftmlp", mixer=grids, img_size=(64, 128), num_classes=3)
    assert model.stages[0].blocks[0].horizontal.mlp.fc1.in_features == 2 * 32
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 3)
