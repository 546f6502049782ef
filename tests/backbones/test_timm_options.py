"""What users of timm type: options under timm's names, chosen maps, and what is refused with the name that fits."""

import pytest
import timm
import torch
from timm.layers import RmsNorm, set_fused_attn
from timm.utils import AttentionExtract
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


@pytest.mark.parametrize("name", ["test_swin_prepbn", "test_pvt_prepbn", "test_convnext_dcls", "test_vir"])
def test_activations_by_name(name):
    model = timm.create_model(name, act_layer="relu")
    mlps = [module for key, module in model.named_modules() if key.endswith(".mlp")]
    assert mlps
    assert all(isinstance(mlp.act, torch.nn.ReLU) for mlp in mlps)
    assert isinstance(
        timm.create_model("test_pyramid", act_layer=torch.nn.SiLU).stages[0].blocks[0].mlp.act, torch.nn.SiLU
    )
    with pytest.raises(ValueError, match=r"act_layer='rely' is unknown \(did you mean 'relu'\?\)"):
        timm.create_model(name, act_layer="rely")


def test_norms_by_name():
    model = timm.create_model("test_plain", norm_layer="rmsnorm")
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    assert {type(norm) for norm in norms} == {RmsNorm}


@pytest.mark.parametrize(
    "name", ["test_agent_swin", "test_agent_cswin", "test_pvt_prepbn", "test_swin_prepbn", "test_plain"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_dropout_rates(name, fused):
    set_fused_attn(fused)
    try:
        torch.manual_seed(0)
        model = timm.create_model(name, attn_drop_rate=0.4, proj_drop_rate=0.3)
        dropping = timm.create_model(name, attn_drop_rate=0.9).train()
    finally:
        set_fused_attn(True)
    torch.manual_seed(0)
    plain = timm.create_model(name)
    rates = {key: module.p for key, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for key, rate in rates.items() if key.endswith("attn_drop")} == {0.4}
    assert {rate for key, rate in rates.items() if "proj_drop" in key or ".mlp." in key} == {0.3}
    assert torch.allclose(model.eval()(IMAGES), plain.eval()(IMAGES), atol=1e-5)
    assert not torch.equal(dropping(IMAGES), dropping(IMAGES))
    plain.train()
    assert torch.equal(plain(IMAGES), plain(IMAGES))


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("test_vmamba", "attn_drop_rate", "mixer 'cross_scan' has no dropout of attention weights.*'softmax'"),
        ("test_vig", "proj_drop_rate", "mixer 'gated_linear_attention' has no dropout of its result"),
        ("test_mambavision", "attn_drop_rate", "block 0 of stage 0, a _ConvBlock, has no mixer"),
    ],
)
def test_rates_that_a_mixer_lacks_are_refused(name, option, message):
    with pytest.raises(ValueError, match=f"{option}=0.1: {message}"):
        timm.create_model(name, **{option: 0.1})
    timm.create_model(name, **{option: 0.0})


def test_activations_that_a_feed_forward_lacks_are_refused():
    with pytest.raises(ValueError, match="act_layer='relu' is no option of the feed-forward 'swiglu'"):
        timm.create_model("test_vig", act_layer="relu")
    with pytest.raises(ValueError, match="of the feed-forward None"):
        timm.create_model("test_vim_tiny", act_layer="relu")


@pytest.mark.parametrize(
    "name",
    [
        "test_plain",
        "test_agent_cswin",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("test_agent_pvt", "test_mavit", "test_swin_prepbn")),
    ],
)
def test_attention_weights_as_timm_extracts_them(name):
    set_fused_attn(False)
    try:
        model = timm.create_model(name).eval()
    finally:
        set_fused_attn(True)
    with torch.no_grad():
        hooked = AttentionExtract(model, method="hook")(IMAGES)
        traced = AttentionExtract(model, names=["*softmax*"])(IMAGES)
    hooked = {key: value for key, value in hooked.items() if value is not None}
    assert hooked
    for key, weights in hooked.items():
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
        assert torch.allclose(traced[key.replace("attn_drop", "softmax")], weights, atol=1e-6)
