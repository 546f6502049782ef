"""visionmix.Backbone by itself: maps, norms, freezing, weights, errors."""

import pytest
import timm
import torch

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
registry = pytest.importorskip("mmengine.registry", reason=REASON)

from visionmix.integrations.openmmlab import Backbone  # noqa: E402


def built(**options):
    """Return the backbone as a config of mmdet or mmseg builds it: by the root registry, from a dict."""
    return registry.MODELS.build({"type": "visionmix.Backbone", **options})


@pytest.mark.parametrize("name", ["test_vmamba", "test_vmamba_v0", "test_msvmamba", "test_vig_h", "test_mamba_yolo"])
def test_maps_are_the_models_own_at_any_size(name):
    torch.manual_seed(0)
    backbone = built(name=name, out_indices=(0, 1, 2, 3), drop_path_rate=0.2).eval()
    model = timm.create_model(name).eval()
    model.load_state_dict(backbone.features.model.state_dict(), strict=False)
    for size in ((65, 97), (32, 32), (4, 7)):
        x = torch.randn(2, 3, *size)
        maps = backbone(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert isinstance(maps, tuple)
        assert [found.shape[1] for found in maps] == backbone.channels
        for found, right in zip(maps, expected, strict=True):
            assert torch.equal(found, right)
    assert [64 // found.shape[2] for found in backbone(torch.randn(1, 3, 64, 64))] == backbone.strides == [4, 8, 16, 32]


def test_out_indices_choose_stages_and_later_ones_are_not_built():
    backbone = Backbone("test_vig_h", out_indices=(0, 2))
    assert backbone.strides == [4, 16]
    assert len(backbone.features.model.stages) == 3
    sum(found.sum() for found in backbone(torch.randn(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_norm_output_normalises_each_position_over_channels():
    torch.manual_seed(0)
    backbone = Backbone("test_vig_h", norm_output=True)
    for found in backbone(torch.randn(1, 3, 64, 64)):
        assert found.mean(1).abs().max() < 1e-5
        assert (found.var(1, unbiased=False) - 1).abs().max() < 1e-2
    assert len([name for name, _ in backbone.named_parameters() if name.startswith("norms.")]) == 8
    assert not [name for name, _ in Backbone("test_vig_h").named_parameters() if name.startswith("norms.")]


def test_frozen_stages_stay_in_eval_mode_and_without_gradients():
    backbone = Backbone("test_vmamba", frozen_stages=2, norm_output=True, drop_path_rate=0.5)
    backbone.train()
    model = backbone.features.model
    for frozen in (model.stem, *model.stages[:2]):
        assert not any(module.training for module in frozen.modules())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for free in (*model.stages[2:], backbone.norms):
        assert all(module.training for module in free.modules())
        assert all(parameter.requires_grad for parameter in free.parameters())
    sum(found.sum() for found in backbone(torch.randn(2, 3, 32, 32))).backward()
    assert model.stem.conv1.weight.grad is None
    assert model.stages[2].downsample.conv.weight.grad is not None
    assert backbone.eval().train().training


def test_frozen_stages_of_zero_is_the_stem():
    model = Backbone("test_vig_h", frozen_stages=0).train().features.model
    assert not model.stem.training
    assert model.stages[0].training


def test_plain_models_have_one_stride_and_say_so():
    with pytest.raises(ValueError, match=r"name='test_vig' gives maps of strides \[16, 16, 16\].*one_stride=True"):
        Backbone("test_vig")
    assert [tuple(found.shape) for found in Backbone("test_vig", out_indices=(2,))(torch.randn(1, 3, 65, 97))] == [
        (1, 48, 4, 6)
    ]
    backbone = Backbone("test_vig", one_stride=True, frozen_stages=1).train()
    assert backbone.strides == [16, 16, 16]
    assert not backbone.features.model.blocks[0].training
    assert backbone.features.model.blocks[1].training


def test_published_weights_outlast_mmengines_initialisation(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vig_h")
    file = tmp_path / "published.pth"
    torch.save(model.state_dict(), file)
    backbone = Backbone("test_vig_h", pretrained=str(file), norm_output=True)
    backbone.init_weights()
    loaded = backbone.features.model.state_dict()
    assert loaded
    for key, value in loaded.items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_init_cfg_loads_a_checkpoint_of_mmengine(tmp_path):
    first = Backbone("test_vmamba", norm_output=True)
    file = tmp_path / "backbone.pth"
    torch.save({"state_dict": first.state_dict()}, file)
    second = Backbone("test_vmamba", norm_output=True, init_cfg={"type": "Pretrained", "checkpoint": str(file)})
    second.init_weights()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_options_reach_the_model():
    backbone = Backbone("test_vmamba", mixer="gated_linear_attention", in_chans=1, embed_dims=(24, 48, 72, 96))
    assert backbone.channels == [24, 48, 72, 96]
    assert backbone(torch.randn(1, 1, 32, 32))[3].shape == (1, 96, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vmamba_tny"}, r"name='vmamba_tny' is not a model.*vmamba_tiny"),
        ({"out_indices": (0, 9)}, r"out_indices=\(0, 9\) does not fit a model of 4 stages"),
        ({"out_indices": (1, 0)}, r"out_indices=\(1, 0\) must be stage numbers in rising order"),
        ({"out_indices": ()}, r"out_indices=\(\) must be"),
        ({"frozen_stages": 5}, r"frozen_stages=5 is out of range.*4 stages"),
        ({"frozen_stages": -2}, r"frozen_stages=-2 is out of range"),
        ({"pretrained": True, "init_cfg": {"type": "Pretrained"}}, r"pretrained=True and init_cfg="),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**{"name": "test_vig_h", **options})


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"pretrained='no/such.pth' is not a file"):
        Backbone("test_vig_h", pretrained="no/such.pth")


def test_a_reduced_backbone_gives_dense_maps_for_a_pyramid():
    """As a detector of ViTDet's kind has it, and in training with frozen blocks."""
    from visionmix import reduction

    torch.manual_seed(0)
    options = {"name": "test_vig", "mixer": "softmax", "mlp_layer": "mlp", "img_size": 64, "one_stride": True}
    reduced, whole = built(**options, reduction="tome:r=4").eval(), built(**options).eval()
    whole.load_state_dict(reduced.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = reduced(x)
        expected = reduction.apply(whole.features, "tome", r=4)(x)
        assert not torch.equal(maps[-1], whole(x)[-1])
    assert [tuple(each.shape) for each in maps] == [(2, 48, 4, 6)] * 3
    assert all(torch.equal(found, right) for found, right in zip(maps, expected, strict=True))
    assert len(maps[-1][0].flatten(1).T.unique(dim=0)) == 24 - 12  # merged cells are alike
    pyramid = registry.MODELS.build({"type": "visionmix.SimplePyramid", "in_channels": 48, "out_channels": 8})
    assert [each.shape[-1] for each in pyramid(maps)] == [24, 12, 6, 3, 2]
    frozen = built(**options, reduction={"method": "tome", "r": 4}, frozen_stages=1).train()
    sum(each.sum() for each in frozen(x)).backward()
    blocks = frozen.features.model.blocks
    assert not blocks[0].training
    assert all(parameter.grad is None for parameter in blocks[0].parameters())
    assert all(parameter.grad is not None for parameter in blocks[2].parameters())


def test_hierarchical_backbones_refuse_a_reduction_of_plain_ones():
    with pytest.raises(TypeError, match="a Hierarchical has several"):
        built(name="test_vmamba", reduction="tome:r=4")
