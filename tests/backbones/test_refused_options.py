"""Options of skeletons that are none, and those that are refused by name before anything is built."""

import numpy as np
import pytest
import timm
import torch

import visionmix  # noqa: F401  registers the models with timm
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
    ],
)
def test_wrong_options_are_named(name, option, value, error):
    with pytest.raises(error, match=rf"{option}="):
        timm.create_model(name, **{option: value})


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
    assert model.num_classes == 4


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
