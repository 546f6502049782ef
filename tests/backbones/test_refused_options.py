"""Options of skeletons that are none, and those that are refused by name before anything is built."""

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf

import visionmix
from visionmix.models import load_checkpoint


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("test_vig", "drop_path_rate", 1.5, ValueError),
        ("test_vig_h", "drop_path_rate", float("nan"), ValueError),
        ("test_vig_h", "drop_rate", "0.1", TypeError),
        ("test_vig", "attn_drop_rate", -0.1, ValueError),
        ("test_vig", "layer_scale", True, TypeError),
        ("test_vig", "layer_scale", float("inf"), ValueError),
        ("test_vig", "in_chans", 0, ValueError),
        ("test_vig_h", "in_chans", 1.5, TypeError),
        ("test_hrvmamba", "in_chans", True, TypeError),
        ("test_vig_h", "num_classes", -3, ValueError),
        ("test_vig", "num_classes", "10", TypeError),
        ("test_vig", "img_size", True, TypeError),
        ("test_vig", "depth", -1, ValueError),
        ("test_vig", "depth", "2", TypeError),
        ("test_vig_h", "depths", 1, TypeError),
        ("test_vig_h", "depths", (1, 1, 1, -1), ValueError),
        ("test_vig_h", "embed_dims", 8, TypeError),
        ("test_vig", "num_heads", 2.0, TypeError),
        ("test_vig", "patch_size", "4", TypeError),
        ("test_vig", "mlp_ratio", 0, ValueError),
        ("test_vig_h", "mlp_ratio", -1.0, ValueError),
        ("test_hrvmamba", "mlp_ratio", float("nan"), ValueError),
        ("test_vig", "mlp_ratio", "2", TypeError),
        ("test_vig", "mlp_ratio", float("inf"), ValueError),
        ("test_vig_h", "act_layer", torch.nn.ReLU(), TypeError),
        ("test_vig_h", "norm_layer", torch.nn.LayerNorm(8), TypeError),
        ("test_vig_h", "global_pool", "foo", ValueError),
        ("test_vim_tiny", "global_pool", "foo", ValueError),
        ("test_vil", "global_pool", "foo", ValueError),
        ("test_vig", "global_pool", 3, TypeError),
        ("test_vim_tiny", "prefix_tokens", 3, TypeError),
        ("test_vim_tiny", "prefix_tokens", True, TypeError),
        ("test_vim_tiny", "prefix_tokens", ["first"], TypeError),
        ("test_vim_tiny", "prefix_tokens", {"cnt": 3}, ValueError),
        ("test_vig_h", "num_heads", 3, TypeError),
        ("test_hrvmamba", "num_exchanges", 3, TypeError),
        ("test_hrvmamba", "neck_dims", 3, TypeError),
        ("test_hrvmamba", "neck_features", "x", TypeError),
        ("test_vig", "stem_layer", "none", ValueError),
        ("test_vig_h", "stem_layer", "none", ValueError),
        ("test_vig", "block_layer", "x", TypeError),
        ("test_vig_h", "block_layer", torch.nn.Identity(), TypeError),
        ("test_vig", "patch_size", (16, 16), TypeError),
        ("test_vig", "in_chans", (3,), TypeError),
        ("test_vig", "stride", 2, ValueError),
        ("test_vig", "device", "nope", ValueError),
        ("test_hrvmamba", "device", 3.5, TypeError),
        ("test_vig_h", "dtype", "float32", TypeError),
        ("test_vig", "dtype", torch.int32, TypeError),
        ("test_vig_h", "dtype", torch.float8_e4m3fn, TypeError),
        ("test_vig", "stride", 2.5, TypeError),
        ("test_vig", "head_layer", "token", ValueError),
        ("test_vig_h", "head_layer", "token", ValueError),
    ],
)
def test_wrong_options_are_named(name, option, value, error):
    with pytest.raises(error, match=rf"{option}="):
        timm.create_model(name, **{option: value})


@pytest.mark.parametrize(
    ("option", "layer", "error", "said"),
    [
        ("mlp_layer", {"name": "mlp", "mlp_ratio": "x"}, TypeError, "mlp_ratio='x'"),
        ("mlp_layer", {"name": "mlp", "mlp_ratio": -1}, ValueError, "mlp_ratio=-1"),
        ("mlp_layer", {"name": "mlp", "drop": 2}, ValueError, "drop=2"),
        ("mlp_layer", {"name": "swiglu", "multiple_of": 0}, ValueError, "multiple_of=0"),
        ("norm_layer", {"name": "layernorm", "eps": "x"}, TypeError, "eps='x'"),
        ("norm_layer", {"name": "layernorm", "eps": -1.0}, ValueError, "eps=-1.0"),
        ("mlp_layer", {"name": "mlp", 3: 4}, ValueError, "no option 3=4"),
    ],
)
def test_wrong_options_of_layers_are_named(option, layer, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("test_vig_h", **{option: layer})


def test_a_stage_without_its_downsampler_is_named():
    with pytest.raises(ValueError, match="downsample_layer: stage 1"):
        timm.create_model("test_vig_h", downsample_layer="none")


def test_lists_of_a_configuration_library_serve():
    stages = OmegaConf.create([["mala"], "softmax", {"cycle": ["mala", "softmax"]}, {"name": "mala"}])
    model = timm.create_model("test_vig_h", mixer=stages, mlp_layer=OmegaConf.create(["mlp"] * 4))
    assert type(model.stages[1].blocks[0].mixer).__name__ == "SoftmaxAttention"
    images = torch.zeros(1, 3, 64, 64)
    for indices in (OmegaConf.create([0, 2]), range(0, 4, 2)):
        assert len(model.forward_intermediates(images, indices, intermediates_only=True)) == 2
    assert len(timm.create_model("test_vig").get_intermediate_layers(images, np.int64(2))) == 2
    assert visionmix.create_mixer("retention", 48, **OmegaConf.create({"decays": [5, 9]})).last_decay == 9
    pooled = visionmix.create_mixer("aggregated", 48, pool_ratio=np.int64(2))
    assert pooled(torch.zeros(1, 8, 8, 48)).shape == (1, 8, 8, 48)


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        ({"count": 2.0}, TypeError, "count=2.0"),
        ({"count": 0}, ValueError, "count=0"),
        ({"positioned": 1}, TypeError, "positioned=1"),
        ("foo", ValueError, "place='foo'"),
    ],
)
def test_wrong_prefix_tokens_are_named(tokens, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("test_vim_tiny", prefix_tokens=tokens)


def test_whole_numbers_of_numpy_and_of_yaml_serve():
    model = timm.create_model(
        "test_vig", img_size=np.int64(64), depth=np.int64(1), layer_scale=1, num_classes=np.int64(3)
    )
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.blocks[0].scale1.gamma.dtype == torch.float32


def test_none_is_a_name_since_timm_drops_none():
    assert isinstance(timm.create_model("test_vig_h", final_norm_layer="none").norm, torch.nn.Identity)
    assert isinstance(timm.create_model("test_vig", pos_embed="none").pos_embed, torch.nn.Identity)
    assert not timm.create_model("test_vig", layer_scale="none").blocks[0].scale1.has_gamma
    options = {"mixer": "gated_linear_attention", "global_pool": "avg"}
    with pytest.raises(ValueError, match="prefix_tokens='none'"):
        timm.create_model("test_vim_tiny", mixer="conv", prefix_tokens="first")
    model = timm.create_model("test_vim_tiny", prefix_tokens="none", **options)
    assert model.num_prefix_tokens == 0
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_reset_classifier_refuses_before_anything_changes():
    model = timm.create_model("test_vig_h", num_classes=4)
    with pytest.raises(TypeError, match="num_classes='10'"):
        model.reset_classifier("10")
    with pytest.raises(ValueError, match="global_pool='foo'"):
        model.reset_classifier(10, "foo")
    assert model.num_classes == 4


@pytest.mark.parametrize("n", [0, 99, [9], "1", 1.5])
def test_methods_name_the_argument_that_is_their_own(n):
    model, images = timm.create_model("test_vig"), torch.zeros(1, 3, 64, 64)
    with pytest.raises((TypeError, ValueError), match=r"^n="):
        model.get_intermediate_layers(images, n)
    with pytest.raises((TypeError, ValueError), match=r"^indices="):
        model.forward_intermediates(images, n)


@pytest.mark.parametrize(
    ("done", "error"), [("0.5", TypeError), (None, TypeError), (True, TypeError), (2, ValueError), (np.nan, ValueError)]
)
def test_progress_is_a_share(done, error):
    with pytest.raises(error, match="done="):
        timm.create_model("test_vig").set_progress(done)


@pytest.mark.parametrize("option", ["filter", "exclude_filters"])
@pytest.mark.parametrize("value", [3, b"vig_*", ["vig_*", 3], [None]])
def test_filters_are_wildcards(option, value):
    with pytest.raises(TypeError, match=f"{option}="):
        visionmix.list_models(**{option: value})


def test_filters_come_in_every_form_that_timm_takes():
    named = visionmix.list_models("vig_*")
    for filters in (["vig_*"], {"vig_*"}, OmegaConf.create(["vig_*"])):
        assert visionmix.list_models(filters, exclude_filters=None) == named
    assert visionmix.list_models(None) == visionmix.list_models()


@pytest.mark.parametrize("indices", [1.0, "1", [[0, 1]], [1.0], True, [True]])
def test_units_are_integers(indices):
    with pytest.raises(TypeError, match="out_indices="):
        timm.create_model("test_vig_h", features_only=True, out_indices=indices)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (None, TypeError),
        (torch.zeros(0, 3, 64, 64), ValueError),
        (torch.full((1, 3, 64, 64), torch.nan), ValueError),
    ],
)
def test_calibrate_takes_images_and_nothing_else(images, error):
    model = timm.create_model("test_ecoformer")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match="images"):
        model.calibrate(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: x.to(torch.int64), "int64 in the file, torch.float32 in the model"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: torch.full_like(x, torch.nan), "not finite"),
    ],
)
def test_weights_of_another_kind_are_refused_whole(change, said, tmp_path):
    model = timm.create_model("test_vig_h")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = {key: change(value) if value.ndim == 2 else value + 1 for key, value in before.items()}
    torch.save(file, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"{said}.*Nothing was loaded"):
        load_checkpoint(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
