"""Published checkpoints load whole, with what fine-tuning may change, or not at all."""

import argparse
import collections
import logging
import re

import golden
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from visionmix.models import load_checkpoint
from visionmix.models.weights import read_checkpoint


@pytest.fixture(scope="module")
def tensors():
    """The published vig_t checkpoint, filled."""
    return golden.state_dict(golden.load("vig_t")[0])


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vig_t.pth"
    torch.save({"model": tensors}, path)
    return path


def create(file, name="vig_t", **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options).eval()


def test_fine_tuning_keeps_all_but_the_classifier(file, tensors):
    model = create(file, num_classes=10)
    assert model.head.fc.weight.shape == (10, 192)
    assert torch.equal(model.norm.weight, tensors["norm.weight"])
    assert torch.equal(model.blocks[3].mixer.qkv.weight, tensors["blocks.3.attn.qkv_proj.weight"])


def test_no_classifier(file, tensors):
    model = create(file, num_classes=0)
    assert torch.equal(model.norm.weight, tensors["norm.weight"])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 192)


def test_features_only(file, tensors):
    model = create(file, features_only=True, out_indices=(3, 11))
    assert torch.equal(model.model.stem.conv1.weight, tensors["patch_embed.proj.0.weight"])


def test_one_channel_sums_the_colours(file, tensors, caplog):
    with caplog.at_level(logging.INFO, logger="visionmix"):
        model = create(file, in_chans=1)
    expected = tensors["patch_embed.proj.0.weight"].sum(dim=1, keepdim=True)
    assert torch.allclose(model.stem.conv1.weight, expected, atol=1e-6)
    assert "in_chans=1" in caplog.text


def test_another_size_resamples_the_positions_once(file, caplog):
    with caplog.at_level(logging.INFO, logger="visionmix"):
        model = create(file, img_size=384)
    assert model.pos_embed.weight.shape == (1, 24, 24, 192)
    assert re.search(r"pos_embed.*resampled from \(1, 196, 192\) to \(1, 24, 24, 192\)", caplog.text)
    image = golden.image(384, 384)
    with torch.no_grad():
        assert torch.allclose(model(image), create(file)(image), atol=1e-5)


def test_all_of_fine_tuning_at_once(file):
    model = create(file, num_classes=10, in_chans=1, img_size=384)
    assert model(torch.zeros(1, 1, 384, 384)).shape == (1, 10)


@pytest.mark.parametrize("options", [{}, {"num_classes": 10}, {"num_classes": 0}])
@pytest.mark.parametrize("name", ["vig_s", "vig_h_t"])
def test_another_models_file_is_refused(file, name, options):
    with pytest.raises(ValueError, match=f"not {name}'s"):
        create(file, name, **options)


def test_another_familys_file_is_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), path)
    with pytest.raises(ValueError, match=r"unknown: conv1\.0\.weight"):
        create(path, num_classes=10)


@pytest.mark.parametrize("key", ["norm.weight", "head.weight", "head.bias", "blocks.5.attn.g_norm.weight", "pos_embed"])
def test_a_missing_key_is_refused(tensors, tmp_path, key):
    path = tmp_path / "partial.pth"
    torch.save({other: value for other, value in tensors.items() if other != key}, path)
    with pytest.raises(ValueError, match="missing"):
        create(path)


def test_nothing_is_loaded_when_refused(tensors):
    model = timm.create_model("vig_t")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = dict(tensors) | {"extra.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"unknown: extra\.weight"):
        load_checkpoint(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fresh_classifier_must_be_asked_for(tensors, tmp_path):
    path = tmp_path / "ten.pth"
    ten = dict(tensors) | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    torch.save(ten, path)
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \(10, 192\), the model's \(1000, 192\)"):
        create(path)
    assert create(path, num_classes=10).head.fc.weight.abs().max() == 0


def test_our_own_files_load_too(tmp_path):
    model = timm.create_model("test_vig", num_classes=7)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    again = create(tmp_path / "own.safetensors", "test_vig", num_classes=7)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("wrap", [
    lambda tensors: tensors,
    lambda tensors: {"state_dict": tensors},
    lambda tensors: {"model": {f"module.{key}": value for key, value in tensors.items()}},
    lambda tensors: {"model": {key: value * 0 for key, value in tensors.items()}, "model_ema": tensors},
    lambda tensors: collections.OrderedDict(model=tensors, epoch=3, optimizer={"state": {}}),
], ids=["bare", "state_dict", "module", "ema", "training"])  # fmt: skip
def test_wrapped_forms(tensors, tmp_path, wrap):
    torch.save(wrap(tensors), tmp_path / "wrapped.pth")
    read = read_checkpoint(tmp_path / "wrapped.pth")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], value) for key, value in tensors.items())


def test_configuration_objects_inside_are_inert(tmp_path):
    namespace = argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=1))
    content = {"model": {"weight": torch.ones(2)}, "args": namespace, "best": np.float64(77.2)}
    torch.save(content, tmp_path / "training.pth")
    assert torch.equal(read_checkpoint(tmp_path / "training.pth")["weight"], torch.ones(2))


class Hostile:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_code_inside_is_refused(tmp_path, capsys):
    torch.save({"model": {"weight": torch.ones(2)}, "extra": Hostile()}, tmp_path / "hostile.pth")
    try:
        read_checkpoint(tmp_path / "hostile.pth")
    except ValueError as error:
        assert "without running code" in str(error)  # noqa: PT017 (an inert stand-in would be as good)
    assert "code of the file ran" not in capsys.readouterr().out


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "half.pth")
    with pytest.raises(ValueError, match="fetch it again"):
        read_checkpoint(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no tensors"):
        read_checkpoint(tmp_path / "empty.pth")


def test_no_published_weights_says_what_to_do():
    with pytest.raises(ValueError, match="pretrained_cfg_overlay"):
        timm.create_model("test_vig", pretrained=True)


def test_unreachable_weights_say_what_to_do(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"hustvl/ViG/vig_s\.pth cannot be fetched \(no network\).*file="):
        timm.create_model("vig_s", pretrained=True)
