"""Backbones of mmdet and mmseg with fewer tokens, timm's ViTs and plain models here: one option of a config."""

import pytest
import timm
import torch

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
pytest.importorskip("mmdet", reason=REASON)
pytest.importorskip("mmseg", reason=REASON)
pytest.importorskip("mmcv.ops", reason=REASON)

from mmengine.registry import MODELS, init_default_scope  # noqa: E402

from visionmix import reduction  # noqa: E402
from visionmix.integrations.openmmlab import Backbone  # noqa: E402
from visionmix.reduction.backbones import ReducedBackbone  # noqa: E402
from visionmix.tools import check_configs, openmmlab  # noqa: E402

VIT = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 64}
MODELS_OF_ONE_STRIDE = {
    "vit": {"name": "vit_tiny_patch16_224", **VIT},
    "deit": {"name": "deit_tiny_distilled_patch16_224", **VIT},
    "registered": {"name": "vit_tiny_in_a_detector", **VIT},
    "plain": {"name": "test_vig", "mixer": "softmax", "mlp_layer": "mlp", "depth": 4},
}
METHODS = {
    "tome": {"r": 4},
    "mctf": {"r": 4},
    "mctf_fast": {},
    "evit": {"keep_rate": 0.5},
    "ats": {"samples": 8},
    "algm": {"threshold": 0.5},
    "avit": {"gate_center": 5},
    "zero_tprune": {"similar": 2},
    "dynamicvit": {"keep_rate": 0.6},
}
EACH = pytest.mark.parametrize("kind", MODELS_OF_ONE_STRIDE)


@pytest.fixture(autouse=True)
def registered():
    reduction.register_model("vit_tiny_in_a_detector", "vit_tiny_patch16_224", "tome:r=4")


def options(kind: str) -> dict:
    """Return the options of a backbone, reduced; a registered name is so already."""
    found = {"type": "visionmix.Backbone", "one_stride": True, **MODELS_OF_ONE_STRIDE[kind]}
    return found if kind == "registered" else found | {"reduction": {"method": "tome", "r": 4}}


def checked(monkeypatch, name: str, change) -> str:
    """Return what `check_configs` says of the config `name` after `change(config.model)`."""
    read = openmmlab.read

    def changed(name, **options):
        config = read(name, **options)
        change(config.model)
        return config

    monkeypatch.setattr(openmmlab, "read", changed)
    return check_configs.check(name)


@EACH
def test_a_detector_trains_and_predicts_through_a_pyramid(monkeypatch, kind):
    """As ViTDet has it, with a gradient for every parameter."""

    def reduced(model):
        model.backbone = {**options(kind), "out_indices": (3,)}
        width = VIT["embed_dim"] if kind != "plain" else 48
        model.neck = {"type": "visionmix.SimplePyramid", "in_channels": width, "out_channels": 64}
        model.bbox_head.anchor_generator.strides = [4, 8, 16, 32, 64]

    assert "boxes" in checked(monkeypatch, "demo/trees.py", reduced)


@EACH
def test_a_segmentation_head_trains_and_predicts(monkeypatch, kind):
    def reduced(model):
        model.backbone = {**options(kind), "out_indices": (1, 3)}
        width = VIT["embed_dim"] if kind != "plain" else 48
        model.decode_head.update(in_channels=[width] * 2, in_index=(0, 1))

    assert "a map of 64x96" in checked(monkeypatch, "demo/nuclei.py", reduced)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 71)])
@EACH
def test_maps_are_dense_and_those_of_the_reduced_model(kind, size):
    torch.manual_seed(0)
    backbone = MODELS.build({**options(kind), "out_indices": (1, 3)}).eval()
    assert isinstance(backbone.features.model, ReducedBackbone)
    assert backbone.strides == [16, 16]
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = backbone(images)
        expected = backbone.features.model.forward_intermediates(images, [1, 3], intermediates_only=True)
        whole = reduction.remove(backbone.features)(images)
    rows, columns = whole[-1].shape[2:]
    if kind != "plain":  # whose stem leaves off what its patches do not fill
        assert (rows, columns) == tuple(-(-side // 16) for side in size)
    assert [tuple(each.shape) for each in maps] == [(2, width, rows, columns) for width in backbone.channels]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    assert not torch.equal(maps[-1], whole[-1])
    assert len(maps[-1][0].flatten(1).T.unique(dim=0)) < rows * columns  # merged cells are alike


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_a_backbone(method):
    """The losses of a method's own are left out, and every parameter has a gradient, as several processes need it."""
    torch.manual_seed(0)
    options = {**MODELS_OF_ONE_STRIDE["vit"], "one_stride": True, "out_indices": (1, 3)}
    backbone = Backbone(**options, reduction={"method": method, **METHODS[method]}).train()
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 6)] * 2
    sum(each.square().sum() for each in maps).backward()
    assert [name for name, value in backbone.named_parameters() if value.grad is None] == []


def test_mmsegs_own_backbone_takes_a_registered_name():
    init_default_scope("mmseg")
    given = {"type": "TIMMBackbone", "model_name": "vit_tiny_in_a_detector", "pretrained": False, **VIT}
    backbone = MODELS.build({**given, "out_indices": (1, 3)})
    assert isinstance(backbone.timm_model.model, ReducedBackbone)
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)] * 2


def test_vits_of_timm_are_frozen_from_the_patches_on():
    backbone = Backbone(**MODELS_OF_ONE_STRIDE["vit"], one_stride=True, frozen_stages=1, drop_path_rate=0.5)
    model = backbone.train().features.model
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith(("blocks.1.", "blocks.2.", "blocks.3.")) for name in trained)
    assert not model.blocks[0].training
    assert model.blocks[1].training
    sum(each.sum() for each in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert model.pos_embed.grad is None
    assert model.blocks[1].mlp.fc1.weight.grad is not None
    free = Backbone(**MODELS_OF_ONE_STRIDE["vit"], one_stride=True)
    assert all(parameter.requires_grad for parameter in free.parameters())


def test_vits_of_timm_load_files(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(num_classes=7, model_name="vit_tiny_patch16_224", **VIT)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    given = MODELS_OF_ONE_STRIDE["vit"]
    backbone = Backbone(**given, one_stride=True, pretrained=str(tmp_path / "vit.pth"), reduction="tome:r=4")
    backbone.init_weights()
    loaded = backbone.features.model.state_dict()
    assert len(loaded) > 40
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())
    torch.save({"state_dict": backbone.state_dict()}, file := str(tmp_path / "backbone.pth"))
    torch.manual_seed(1)
    again = Backbone(**given, one_stride=True, init_cfg={"type": "Pretrained", "checkpoint": file})
    again.init_weights()
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"name": "samvit_base_patch16_224"},
            ValueError,
            "name='samvit_base_patch16_224' is a VisionTransformerSAM.*cuts whole maps into windows.*; give a model of",
        ),
        ({"name": "swin_tiny_patch4_window7_224"}, ValueError, "is a SwinTransformer.*into windows.*; give a model of"),
        ({"name": "resnet18"}, ValueError, "is a ResNet of timm, which mmseg.TIMMBackbone takes; give a model of"),
        ({"name": "vit_tinny_patch16_224"}, ValueError, r"name='vit_tinny_patch16_224'.*mean 'vit_tiny_patch16_224'"),
        ({"name": "test_vmamba"}, TypeError, "'tome' reduces .* a Hierarchical has several: take a plain model"),
        ({"name": "test_vim_tiny"}, TypeError, "BidirectionalMamba is not softmax attention"),
    ],
)
def test_models_of_windows_and_stages_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Backbone(**options, one_stride=True, reduction="tome:r=4")
