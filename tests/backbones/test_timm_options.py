"""What users of timm type: options under timm's names, chosen maps, and what is refused with the name that fits."""

import pytest
import timm
import torch
from tiny_models import EVERY

IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("indices", [(1, 2, 3, 4), (-5,), 5, 0, ()])
def test_maps_that_a_model_lacks_are_refused_with_those_it_has(indices):
    with pytest.raises(ValueError, match=r"out_indices=.*4 stages, numbered 0 to 3.*\(0, 1, 2, 3\)"):
        timm.create_model("test_vmamba", features_only=True, out_indices=indices)
    model = timm.create_model("test_vmamba")
    with pytest.raises(ValueError, match="4 stages"):
        model.forward_intermediates(IMAGES, indices=list(indices) if isinstance(indices, tuple) else indices)


def test_blocks_and_resolutions_are_named_as_such():
    with pytest.raises(ValueError, match="blocks, numbered 0 to"):
        timm.create_model("test_vig", features_only=True, out_indices=(30,))
    with pytest.raises(ValueError, match="resolutions, numbered 0 to"):
        timm.create_model("test_hrvmamba", features_only=True, out_indices=(30,))


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"init_values": 1e-5}, "layer_scale="),
        ({"class_token": True}, "prefix_tokens"),
        ({"dynamic_img_size": True}, "any size"),
        ({"qkv_bias": False}, r"mixer=dict\(name=..., qkv_bias=...\)"),
        ({"layer_scales": 1e-5}, r"did you mean 'layer_scale'\?"),
    ],
)
def test_unknown_options_are_refused_with_the_one_that_fits(option, remedy):
    (name,) = option
    with pytest.raises(TypeError, match=f"test_vig has no option {name}=.*{remedy}"):
        timm.create_model("test_vig", **option)


def test_output_stride_and_wrappers_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="halve the map"):
        timm.create_model("test_vmamba", features_only=True, output_stride=16)
    with pytest.raises(ValueError, match="feature_cls='list'"):
        timm.create_model("test_vmamba", features_only=True, feature_cls="list")
    assert len(timm.create_model("test_vmamba", features_only=True, feature_cls="hook")(IMAGES)) == 4


@EVERY
def test_a_pruned_model_says_what_is_left(name):
    model = timm.create_model(name).eval()
    if not hasattr(model, "stages") or hasattr(model, "neck") or hasattr(model, "class_token"):
        pytest.skip("blocks and resolutions stay of one width, and a class token of the last stage needs that stage")
    maps = model.forward_intermediates(IMAGES, intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    features = model.forward_features(IMAGES)
    assert features.shape[-1] == model.num_features == model.head_hidden_size == model.feature_info[1]["num_chs"]
    assert torch.equal(features.permute(0, 3, 1, 2), maps[1])
    assert model(IMAGES).shape[1:] == features.shape[1:]
