"""`load_checkpoint`: published and own names, files without a classifier or with another one, and refusals."""

import logging
import re

import golden
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_models import EACH_MIXER, EVERY
from torch import nn

from visionmix.models import Join, KeyMap, load_checkpoint
from visionmix.models.keys import split_class_position

# A published file of each layout, and the prefix of its classifier's keys.
PUBLISHED = {
    "vig_t": "head.",
    "vmamba_tiny_v0": "classifier.head.",
    "agent_pvt_tiny": "head.",
    "efficient_vmamba_tiny": "classifier.head.",
    "mavit_tiny": "head.",
    "plainmamba_l1": "head.",
    "dinat_mini": "head.",
}
HEADS = {"mavit_tiny": ("head.", "proj.", "norm.")}  # a projection and a norm belong to its head


@pytest.fixture(autouse=True)
def quick_start():
    with golden.quick_start():
        yield


@pytest.fixture(scope="module")
def published():
    """Return the published tensors of a model, filled by the goldens' rule."""
    return {name: golden.state_dict(golden.load(name)[0]) for name in PUBLISHED}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_loads_as_by_timm(published, tmp_path, name):
    torch.save({"model": published[name]}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    for source in (tmp_path / "published.pth", str(tmp_path), {"state_dict": published[name]}):
        model = timm.create_model(name)
        assert load_checkpoint(model, source) == []
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@EVERY
def test_own_file_loads_into_any_number_of_classes(name, caplog):
    after = timm.create_model(name).state_dict()
    for num_classes in (0, 7, 1000):
        model = timm.create_model(name, num_classes=num_classes)
        before = state(model)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="visionmix"):
            fresh = load_checkpoint(model, after)
        names = model.default_cfg["classifier"]
        classifiers = [
            f"{layer}.{leaf}" for layer in ([names] if isinstance(names, str) else names) for leaf in ("weight", "bias")
        ]
        assert fresh == (classifiers if num_classes == 7 else []), num_classes
        assert ("num_classes=7" in caplog.text) == (num_classes == 7), num_classes
        for key, value in model.state_dict().items():
            assert torch.equal(value, (before if key in fresh else after)[key]), (num_classes, key)


@pytest.mark.parametrize("num_classes", [pytest.param(1000, marks=pytest.mark.long), 10, 0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_file_without_a_classifier_keeps_the_models(published, caplog, name, num_classes):
    """Encoders of detectors: what their authors publish has no classifier."""
    encoder = {
        key: value for key, value in published[name].items() if not key.startswith(HEADS.get(name, PUBLISHED[name]))
    }
    assert len(encoder) < len(published[name])
    model, whole = timm.create_model(name, num_classes=num_classes), timm.create_model(name)
    before = state(model)
    load_checkpoint(whole, published[name])
    with caplog.at_level(logging.WARNING, logger="visionmix"):
        fresh = load_checkpoint(model, {"state_dict": encoder})
    head = [key for key in before if key.startswith("head.")]
    assert sorted(fresh) == sorted(head)
    assert ("no classifier" in caplog.text) == bool(head)
    after = whole.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key in head else after)[key]), key


def test_half_a_classifier_is_refused(published):
    for leaf in ("weight", "bias"):
        tensors = {key: value for key, value in published["vig_t"].items() if key != f"head.{leaf}"}
        with pytest.raises(ValueError, match=rf"missing: head\.fc\.{leaf}"):
            load_checkpoint(timm.create_model("vig_t"), tensors)


def test_projection_may_be_there_without_the_classifier(published):
    tensors = {key: value for key, value in published["mavit_tiny"].items() if not key.startswith("head.")}
    model = timm.create_model("mavit_tiny")
    assert load_checkpoint(model, tensors) == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(model.head.proj.bias, tensors["proj.bias"])
    lacking = {key: value for key, value in tensors.items() if key != "proj.bias"}
    with pytest.raises(ValueError, match=r"missing: head\.proj\.bias"):
        load_checkpoint(model, lacking)


def with_classes(tensors, count):
    return tensors | {"head.weight": torch.ones(count, 192), "head.bias": torch.ones(count)}


def test_file_of_22k_classes_names_the_calls_that_work(published, tmp_path, caplog):
    torch.save(with_classes(published["vig_t"], 21841), tmp_path / "22k.pth")
    overlay = {"file": str(tmp_path / "22k.pth")}
    with pytest.raises(ValueError, match=r"classifier has 21841 classes, the model's 1000.*num_classes=21841") as error:
        timm.create_model("vig_t", pretrained=True, pretrained_cfg_overlay=overlay)
    assert "free to differ" not in str(error.value)
    overlay |= {"num_classes": 21841}
    whole = timm.create_model("vig_t", pretrained=True, pretrained_cfg_overlay=overlay)
    assert whole.head.fc.weight.shape == (21841, 192)
    assert whole.head.fc.weight.eq(1).all()
    with caplog.at_level(logging.WARNING, logger="visionmix"):
        tuned = timm.create_model("vig_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=1000)
    assert tuned.head.fc.weight.shape == (1000, 192)
    assert "classifier has 21841 classes, num_classes=1000" in caplog.text
    for model in (whole, tuned):
        assert torch.equal(model.norm.weight, published["vig_t"]["norm.weight"])


def test_file_of_22k_classes_into_a_model_that_was_built_for_others(published):
    tensors = with_classes(published["vig_t"], 21841)
    with pytest.raises(ValueError, match="pretrained_cfg_overlay"):
        load_checkpoint(timm.create_model("vig_t"), tensors)
    assert load_checkpoint(timm.create_model("vig_t", num_classes=21841), tensors) == []
    assert load_checkpoint(timm.create_model("vig_t", num_classes=3), tensors) == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize("num_classes", [1000, 7, 0])
def test_nothing_is_loaded_from_another_models_file(published, num_classes):
    model = timm.create_model("vig_t", num_classes=num_classes)
    before = state(model)
    for tensors in (published["dinat_mini"], timm.create_model("test_vig").state_dict(), {"x": torch.ones(2)}):
        with pytest.raises(ValueError, match="not vig_t's"):
            load_checkpoint(model, tensors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@EACH_MIXER
def test_refusals_are_value_errors(published, name):
    model = timm.create_model(name)
    for other in ("vig_t", "mavit_tiny", "dinat_mini", "agent_pvt_tiny"):
        with pytest.raises(ValueError, match=f"not {name}'s"):
            load_checkpoint(model, published[other])


def test_what_is_no_source_is_refused(tmp_path):
    model = timm.create_model("test_vig")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_checkpoint(model, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        load_checkpoint(model, tmp_path)
    with pytest.raises(TypeError, match="source is a int"):
        load_checkpoint(model, 3)
    with pytest.raises(ValueError, match="no tensors"):
        load_checkpoint(model, {"epoch": 3})


def test_checkpoints_of_training_runs(tmp_path):
    """The average of the weights is taken where there is one; what only describes it is no average."""
    made, averaged = timm.create_model("test_vig"), timm.create_model("test_vig")
    for ema, expected in ((averaged.state_dict(), averaged), (None, made), ({"decay": 0.9}, made)):
        torch.save({"epoch": 3, "model": made.state_dict(), "ema": ema}, tmp_path / "last.pt")
        model = timm.create_model("test_vig")
        load_checkpoint(model, tmp_path / "last.pt")
        assert torch.equal(model.head.fc.weight, expected.head.fc.weight)


def test_folder_of_timm(tmp_path):
    made, model = timm.create_model("test_vim_tiny"), timm.create_model("test_vim_tiny")
    save_for_hf(made, tmp_path, safe_serialization="both")
    load_checkpoint(model, tmp_path)
    assert torch.equal(model.head.fc.weight, made.head.fc.weight)


def test_names_of_models_that_timm_did_not_make(published):
    made = timm.create_model("vig_t")
    del made.pretrained_cfg
    with pytest.raises(ValueError, match="give name="):
        load_checkpoint(made, published["vig_t"])
    load_checkpoint(made, published["vig_t"], name="vig_t")
    assert torch.equal(made.norm.weight, published["vig_t"]["norm.weight"])
    with pytest.raises(ValueError, match="did you mean 'vig_t'"):
        load_checkpoint(made, published["vig_t"], name="vigt")


def test_models_of_timm_load_their_own_files(tmp_path):
    made, model = (timm.create_model("test_vit", num_classes=count) for count in (1000, 5))
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    assert load_checkpoint(model, tmp_path) == ["head.weight", "head.bias"]
    assert torch.equal(model.cls_token, made.cls_token)


class Tied(nn.Module):
    """Two layers of one weight, and one that files lack."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.first, self.second, self.extra = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(1, 1)
        self.second.weight = self.first.weight


def load_tied(tensors, **rules):
    from timm.models import PretrainedCfg

    from visionmix.models.loading import load_tensors

    model = Tied()
    before = model.extra.weight.item()
    fresh = load_tensors(model, tensors, KeyMap(**rules), PretrainedCfg(), name="tied")
    assert model.extra.weight.item() == before
    assert model.first.weight is model.second.weight
    return model.first.weight, fresh


def test_parameters_that_files_lack_keep_their_values_and_tied_ones_are_loaded():
    lacks = {r"^extra\.": "drawn when the model is built", r"^second\.": "the first one's"}
    weight, fresh = load_tied({"first.weight": torch.full((2, 2), 3.0)}, lacks=lacks)
    assert weight.eq(3).all()
    assert sorted(fresh) == ["extra.bias", "extra.weight", "second.weight"]
    with pytest.raises(ValueError, match=r"missing: second\.weight"):
        load_tied({"first.weight": torch.ones(2, 2)}, lacks={r"^extra\.": "drawn when the model is built"})


def test_tied_keys_of_a_file_must_agree():
    keys = KeyMap(rename=[(r"^copy\.", "layer.")], tied={r"^layer\.": "one layer, saved twice"})
    ones = torch.ones(2)
    assert keys({"layer.w": ones, "copy.w": ones.clone()}).keys() == {"layer.w"}
    with pytest.raises(ValueError, match=r"two keys of the file become 'layer\.w', one of them 'copy\.w'"):
        keys({"layer.w": ones, "copy.w": 2 * ones})
    with pytest.raises(ValueError, match="two keys of the file"):
        KeyMap(rename=[(r"^copy\.", "layer.")])({"layer.w": ones, "copy.w": ones})


def test_joins_by_a_function_and_by_dotted_names():
    parts = {f"scan.A_log_{index}": torch.full((3,), float(index)) for index in range(4)}
    join = Join([f"A_log_{index}" for index in range(4)], "A_log", torch.stack)
    joined = KeyMap(join=[join])(parts | {"scan.A_log_00": torch.ones(1)})
    assert joined.keys() == {"scan.A_log", "scan.A_log_00"}
    assert torch.equal(joined["scan.A_log"], torch.stack(list(parts.values())))
    nested = KeyMap(join=[Join(("attns.0.v", "attns.1.v"), "v")])({f"b.attns.{i}.v.w": torch.ones(1) for i in (0, 1)})
    assert nested["b.v.w"].shape == (2,)
    alone = KeyMap(join=[Join(("q", "kv"), "qkv")])({"q.weight": torch.ones(1)})
    assert alone.keys() == {"q.weight"}


def test_key_maps_add_up_in_order():
    first = KeyMap(rename=[("^a", "b")], transform=split_class_position, drop={"^x": "unused"})
    second = KeyMap(
        rename=[("^b", "pos_embed")],
        transform=lambda key, tensor: {f"{key}.half": tensor / 2} if "class" in key else tensor,
        reshape=True,
    )
    both = first + second
    assert both.reshape
    made = both({"a.weight": torch.arange(6.0).view(1, 3, 2), "x": torch.ones(1)})
    assert made.keys() == {"pos_embed.weight", "class_token.pos_embed.half"}
    assert torch.equal(made["class_token.pos_embed.half"], torch.tensor([[[0.0, 0.5]]]))


def test_files_with_a_downsamplers_former_name_load():
    model, other = timm.create_model("test_convnext_dcls"), timm.create_model("test_convnext_dcls")
    former = {re.sub(r"(downsample\.conv)\.", r"\1.conv.", key): value for key, value in model.state_dict().items()}
    assert former.keys() != model.state_dict().keys()
    assert load_checkpoint(other, former) == []
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_can_hold_no_weights_is_refused():
    model = timm.create_model("test_vig_h")
    weights = model.state_dict()
    with pytest.raises(ValueError, match="test_vig_h lies on the device meta"):
        load_checkpoint(timm.create_model("test_vig_h", device="meta"), weights)
    with pytest.raises(ValueError, match=r"head\.fc\.bias lies on the device meta, without numbers"):
        load_checkpoint(model, {key: value.to("meta") for key, value in weights.items()})
    with pytest.raises(TypeError, match="FeatureGetterNet and no classifier"):
        load_checkpoint(timm.create_model("test_vig_h", features_only=True), weights)
    with pytest.raises(ValueError, match="name='test_vgi' is not a model"):
        load_checkpoint(model, weights, name="test_vgi")
    with pytest.raises(TypeError, match="name=3"):
        load_checkpoint(model, weights, name=3)


def test_a_compiled_model_takes_the_weights_of_its_own():
    model = timm.create_model("test_vig_h")
    weights = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    assert load_checkpoint(torch.compile(model), weights) == []
    assert not any(value.any() for value in model.parameters())
