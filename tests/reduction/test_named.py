"""Reduced models where timm.create_model is the only way in: by a keyword, by a registered name, in other libraries."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from visionmix import reduction
from visionmix.reduction.backbones import ReducedBackbone

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
PLAIN = {"mixer": "softmax", "mlp_layer": "mlp", "img_size": 64}  # for test_vig
DEPTH = 3  # of test_vig, whose width is 48
NAME, OF, SPEC = "vit_tiny_tome_named", "vit_tiny_patch16_224", "tome:r=5"


@pytest.fixture(autouse=True)
def registered():
    reduction.register_model(NAME, OF, SPEC)


def same(reduced, plain):
    """Assert that two models differ in the reduction alone."""
    plain.load_state_dict(reduced.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = reduced.eval()(images), reduction.apply(plain.eval(), SPEC)(images)
    for first, second in zip(*((each if isinstance(each, list) else [each]) for each in (ours, theirs)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("features", [{}, {"features_only": True, "out_indices": (0, 2)}])
def test_plain_models_take_a_reduction(features):
    reduced = timm.create_model("test_vig", reduction=SPEC, **PLAIN, **features)
    same(reduced, timm.create_model("test_vig", **PLAIN, **features))
    if features:
        assert [tuple(each.shape) for each in reduced(torch.randn(1, 3, 64, 96))] == [(1, 48, 4, 6)] * 2
    else:
        assert reduced.forward_tokens(torch.randn(1, 3, 64, 64)).size.max() > 1


def test_a_saved_folder_of_a_reduced_plain_model_is_read_reduced(tmp_path):
    reduced = timm.create_model("test_vig", reduction={"method": "tome", "r": 5}, **PLAIN)
    timm.models.save_for_hf(reduced, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.reduction.r == (5,) * DEPTH
    same(again, timm.create_model("test_vig", **PLAIN))
    with torch.no_grad():
        assert torch.equal(again.eval()(torch.ones(1, 3, 64, 64)), reduced.eval()(torch.ones(1, 3, 64, 64)))


def test_other_models_refuse_a_reduction():
    with pytest.raises(TypeError, match=r"class Hierarchical cannot be reduced"):
        timm.create_model("test_vmamba", reduction=SPEC)
    with pytest.raises(ValueError, match="did you mean 'tome'"):
        timm.create_model("test_vig", reduction="tomme:r=3", **PLAIN)


@pytest.mark.parametrize("features", [{}, {"features_only": True, "out_indices": (1, 3)}])
def test_a_registered_name_is_the_model_reduced(features):
    options = {**SMALL, "dynamic_img_size": True, **features}
    same(timm.create_model(NAME, **options), timm.create_model(OF, **options))


def test_a_registered_name_has_the_weights_of_its_model():
    tags = [name.removeprefix(OF) for name in timm.list_models(f"{OF}.*", include_tags=True)]
    assert len(tags) > 1
    assert sorted(timm.list_models(f"{NAME}.*", include_tags=True)) == sorted(f"{NAME}{tag}" for tag in tags)
    for tag in ("", *tags):
        ours, theirs = timm.get_pretrained_cfg(f"{NAME}{tag}"), timm.get_pretrained_cfg(f"{OF}{tag}")
        assert (ours.hf_hub_id, ours.tag, ours.mean) == (theirs.hf_hub_id, theirs.tag, theirs.mean)
        assert ours.architecture == NAME
    tagged = f"{OF}.{tags[-1][1:]}"
    reduction.register_model("vit_tiny_tome_tagged", tagged, SPEC)
    assert timm.get_pretrained_cfg("vit_tiny_tome_tagged").tag == tags[-1][1:]
    assert timm.create_model("vit_tiny_tome_tagged", **SMALL).pretrained_cfg["tag"] == tags[-1][1:]


def test_a_registered_name_loads_files_and_saved_folders(tmp_path):
    given = timm.create_model(OF, num_classes=3, **SMALL)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    overlay = {"file": str(tmp_path / "given.pth"), "num_classes": 3, "custom_load": False}
    reduced = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **SMALL)
    assert isinstance(reduced, ReducedBackbone)
    assert all(torch.equal(value, reduced.state_dict()[key]) for key, value in given.state_dict().items())
    timm.models.save_for_hf(reduced, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert isinstance(again, ReducedBackbone)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in given.state_dict().items())


def test_registering_again_changes_nothing_and_mistakes_are_refused():
    entry = timm.models.model_entrypoint(NAME)
    reduction.register_model(NAME, OF, SPEC)
    assert timm.models.model_entrypoint(NAME) is entry
    for name, of, spec, words in (
        (NAME, OF, "tome:r=6", f"name='{NAME}' is taken"),
        ("vit_tiny_patch16_224", OF, SPEC, "is taken"),
        ("vit.tome", OF, SPEC, "has a tag"),
        ("vit_new", "vit_tiny_patch16_244", SPEC, "is not a model that timm knows"),
        ("vit_new", OF, "tomme:r=6", "did you mean 'tome'"),
    ):
        with pytest.raises(ValueError, match=words):
            reduction.register_model(name, of, spec)
    assert not timm.is_model("vit_new")


def test_segmentation_models_take_reduced_encoders():
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    reduction.register_model("test_vit_tome", "test_vit", SPEC)
    model = smp.DPT("tu-test_vit_tome", encoder_weights=None, classes=2, img_size=64).eval()
    plain = smp.DPT("tu-test_vit", encoder_weights=None, classes=2, img_size=64).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(images).shape == (1, 2, 64, 64)
        assert not torch.equal(model(images), plain(images))
        plain.encoder.model = reduction.apply(plain.encoder.model, SPEC)
        assert torch.equal(model(images), plain(images))
    model.train()(images.repeat(2, 1, 1, 1)).sum().backward()
    assert model.encoder.model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    decoder = {"decoder_readout": "ignore", "decoder_intermediate_channels": (8, 8, 8)}
    options = {"encoder_weights": None, "encoder_depth": DEPTH, **decoder, **PLAIN}
    ours = smp.DPT("tu-test_vig", reduction=SPEC, **options).eval()
    assert ours(images).shape == (1, 1, 64, 64)
    assert ours.encoder.model.reduction.r == (5,) * DEPTH


def test_transformers_backbones_are_reduced(tmp_path, monkeypatch):
    # In a clone the folder kernels/ is not the package of that name, which transformers looks for.
    clone = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != clone])
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[1, 3])
    model = transformers.TimmBackbone(config, **SMALL).eval()
    maps = model(torch.randn(2, 3, 32, 32)).feature_maps
    assert [tuple(each.shape) for each in maps] == [(2, 24, 8, 8)] * 2
    assert model._backbone.model.reduction.r == (5,) * 4
    model.save_pretrained(tmp_path)
    again = transformers.TimmBackbone(transformers.TimmBackboneConfig.from_pretrained(tmp_path), **SMALL)
    assert again._backbone.model.reduction.r == (5,) * 4
    config = transformers.TimmBackboneConfig(backbone="test_vig", out_indices=[0, 2])
    ours = transformers.TimmBackbone(config, reduction=SPEC, **PLAIN).eval()
    assert [tuple(each.shape) for each in ours(torch.randn(2, 3, 64, 64)).feature_maps] == [(2, 48, 4, 4)] * 2
    assert ours._backbone.model.reduction.r == (5,) * DEPTH
