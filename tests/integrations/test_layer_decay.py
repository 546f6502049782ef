"""Layer-wise decay as an optimizer constructor: the groups are timm's own on the same backbone."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
registry = pytest.importorskip("mmengine.registry", reason=REASON)
optim = pytest.importorskip("mmengine.optim", reason=REASON)

from visionmix.integrations.openmmlab import Backbone  # noqa: E402


class Detector(nn.Module):
    """A backbone with norms after its maps, and a head with a convolution and a norm."""

    def __init__(self, name, **options):
        super().__init__()
        self.backbone = Backbone(name, norm_output=True, **options)
        self.bbox_head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))


def wrapper(model, paramwise=None, **optimizer):
    settings = {"type": "AdamW", "lr": 2e-4, "weight_decay": 0.05} | optimizer
    config = {
        "optimizer": settings,
        "constructor": "visionmix.LayerDecay",
        "paramwise_cfg": paramwise or {"layer_decay": 0.7},
    }
    return optim.build_optim_wrapper(model, {"type": "OptimWrapper", **config})


def settings(groups, names) -> dict[str, tuple[float, float]]:
    """Return (learning rate, decay) by the parameter's name."""
    return {
        names[parameter]: (group.get("lr", 2e-4 * group.get("lr_scale", 1)), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_vmamba", {}), ("test_vim_tiny", {"one_stride": True}), ("test_agent_swin", {}), ("test_dinat", {})],
)
def test_groups_are_those_of_timm_on_the_same_backbone(name, options):
    detector = Detector(name, **options)
    built = wrapper(detector).optimizer
    backbone = detector.backbone.features.model
    names = {parameter: key for key, parameter in detector.named_parameters()}
    ours = settings(built.param_groups, names)
    assert ours.keys() == set(names.values())

    whole = timm.create_model(name)  # with its classifier, which is the top as a detector's head is
    theirs = param_groups_layer_decay(
        whole, weight_decay=0.05, no_weight_decay_list=whole.no_weight_decay(), layer_decay=0.7
    )
    expected = settings(theirs, {parameter: key for key, parameter in whole.named_parameters()})
    inner = {key: value for key, value in ours.items() if key.startswith("backbone.features.model.")}
    assert len(inner) == len(list(backbone.parameters()))
    for key, (rate, decay) in inner.items():
        assert (pytest.approx(rate), decay) == expected[key.removeprefix("backbone.features.model.")], key
    assert len({rate for rate, _ in inner.values()}) > 3

    for key, value in ours.items():
        if key not in inner:  # norms of the maps, and the head: the top layer
            assert value == (pytest.approx(2e-4), 0.0 if names_of_one_axis(detector, key) else 0.05), key


def names_of_one_axis(model, key) -> bool:
    return dict(model.named_parameters())[key].ndim <= 1


def test_the_models_own_exceptions_are_not_decayed():
    detector = Detector("test_agent_swin")
    named = {f"backbone.features.model.{key}" for key in detector.backbone.features.model.no_weight_decay()}
    parameters = dict(detector.named_parameters())
    assert [key for key in named if parameters[key].ndim > 1]
    groups = wrapper(detector).optimizer.param_groups
    found = settings(groups, {parameter: key for key, parameter in parameters.items()})
    assert {found[key][1] for key in named} == {0.0}


def test_frozen_stages_are_left_out_and_the_rest_learns():
    detector = Detector("test_vmamba", frozen_stages=1)
    groups = wrapper(detector).optimizer.param_groups
    given = {parameter for group in groups for parameter in group["params"]}
    assert given == {parameter for parameter in detector.parameters() if parameter.requires_grad}
    assert len(given) < len(list(detector.parameters()))


def test_rates_scale_the_step():
    """Of equal gradients, a plain gradient step moves each layer by its own rate."""
    detector = Detector("test_vmamba")
    built = wrapper(detector, type="SGD", lr=1.0, weight_decay=0.0).optimizer
    before = {key: value.detach().clone() for key, value in detector.named_parameters()}
    for parameter in detector.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    moved = {key: (before[key] - value).mean().item() for key, value in detector.named_parameters()}
    assert moved["bbox_head.0.weight"] == pytest.approx(1.0)
    stem = [value for key, value in moved.items() if ".stem." in key]
    last = [value for key, value in moved.items() if ".stages.3.blocks.0." in key]
    assert max(stem) < 0.2 < min(last) == pytest.approx(0.7, abs=0.25)


def test_layers_may_be_given_by_their_parameters_names():
    """ConvNeXt's stages: one layer each above stem and downsamplers, two empty ones below the heads."""
    stages = [rf"^stages\.{stage}\." for stage in range(4)]
    detector = Detector("test_convnext_dcls")
    paramwise = {"layer_decay": 0.5, "layers": [r"^stem\.|\.downsample\.", *stages, None, None]}
    built = wrapper(detector, paramwise).optimizer
    found = settings(built.param_groups, {parameter: key for key, parameter in detector.named_parameters()})
    assert found.keys() == dict(detector.named_parameters()).keys()
    inner = "backbone.features.model."
    powers = {
        "stem.conv1.weight": 7,
        "stages.0.blocks.0.mlp.fc1.weight": 6,
        "stages.1.downsample.conv.weight": 7,
        "stages.2.blocks.1.mlp.fc1.weight": 4,
        "stages.3.blocks.0.mlp.fc2.weight": 3,
    }
    for key, power in powers.items():
        assert found[inner + key] == (pytest.approx(2e-4 * 0.5**power), 0.05), key
    assert found["bbox_head.0.weight"] == (pytest.approx(2e-4), 0.05)
    assert found["backbone.norms.0.weight"] == (pytest.approx(2e-4), 0.0)
    for key in ("stages.3.blocks.0.mlp.fc2.bias", "stages.3.spacings.positions"):  # one axis, named by the model
        assert found[inner + key] == (pytest.approx(2e-4 * 0.5**3), 0.0), key


def test_a_parameter_of_no_layer_is_named():
    with pytest.raises(ValueError, match=r"'stem\.conv1\.weight' is in none of layers"):
        wrapper(Detector("test_convnext_dcls"), {"layer_decay": 0.5, "layers": [r"^stages\."]})


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"layer_decay": 0.7, "layers": []}, "layers=\\[\\]"),
        ({"layer_decay": 0.7, "layers": ["("]}, "layers=\\['\\('\\]"),
        ({"layer_decay": 0.7, "layers": "^stem"}, "layers='\\^stem'"),
        ({"layer_decay": 0.0}, "above 0 and at most 1"),
        ({"layer_decay": "0.7"}, "above 0 and at most 1"),
        ({"layer_decay": 0.7, "custom_keys": {}}, "_delete_=True"),
        ({"num_layers": 12}, "takes dict"),
    ],
)
def test_other_settings_are_refused(paramwise, message):
    with pytest.raises(ValueError, match=message):
        wrapper(Detector("test_vmamba"), paramwise)


def test_other_backbones_and_optimisers_without_a_rate_are_refused():
    with pytest.raises(ValueError, match=r"Sequential has no visionmix\.Backbone"):
        wrapper(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="must have lr and weight_decay"):
        wrapper(Detector("test_vmamba"), lr=None)
