"""Models with weights of any file: as published, timm's, a user's, and what is refused."""

import argparse
import functools

import golden
import pytest
import timm
import torch
from timm.models import save_for_hf

from visionmix.tools import checkpoint, models, predict

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_start():
    with golden.quick_start():
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the path of a model's published file, filled by the rule of the goldens, with a configuration object
    inside.
    """
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def path(name: str) -> str:
        meta, _ = golden.load(name)
        torch.save({"model": golden.state_dict(meta), "config": argparse.Namespace(lr=0.1)}, folder / f"{name}.pth")
        return str(folder / f"{name}.pth")

    return path


@pytest.mark.parametrize("name", ["vig_t", "msvmamba_nano", "agent_deit_tiny"])
def test_a_published_file_gives_the_published_logits(published, name):
    trained = models.load_trained(published(name), name=name, device=CPU)
    meta, arrays = golden.load(name)
    assert len(trained.classes) == trained.model.num_classes == 1000
    assert trained.classes[0].startswith("tench")
    with torch.inference_mode():
        logits = trained.model(golden.image(*meta["image_size"]))
    assert golden.relative_error(logits, arrays["logits"]) < 1e-5
    assert "state_dict" not in trained.model.pretrained_cfg


def test_predict_takes_a_published_file(published, tree, capsys):
    image = tree / "val" / "red" / "0.jpg"
    assert predict.main([str(image), "--checkpoint", published("vig_t"), "--model", "vig_t"]) == 0
    out = capsys.readouterr().out
    labels = models.load_trained(published("vig_t"), name="vig_t", device=CPU).classes
    assert sum(label[:20] in out for label in labels) >= 5


@pytest.mark.parametrize("name", ["vig_t", "test_vit", "test_vmamba"])
def test_another_number_of_classes_never_gets_a_fresh_classifier(published, tmp_path, name):
    """Not for a published file, one of timm's or one of one's own, whatever number is asked for."""
    if name == "vig_t":
        path, own = published(name), 1000
    else:
        path, own = str(tmp_path / "own.pth"), 7
        torch.save(timm.create_model(name, num_classes=own).state_dict(), path)
    for classes in {3, 7, 1000} - {own}:
        with pytest.raises(ValueError, match=rf"--num-classes={classes}.*|\.pth"):
            models.load_trained(path, name=name, classes=classes, device=CPU)
    saved = checkpoint.read(path)["model"].values()
    for classes in (own, None):
        model = models.load_trained(path, name=name, classes=classes, device=CPU).model
        assert model.num_classes == own
        assert any(torch.equal(model.get_classifier().weight, tensor) for tensor in saved)


def test_pretrained_weights_of_another_number_of_classes_are_refused(tmp_path, monkeypatch):
    saved = timm.create_model("test_vit").state_dict()
    create = timm.create_model

    def from_here(name, pretrained=False, **options):
        overlay = {"pretrained_cfg_overlay": {"state_dict": dict(saved)}} if pretrained else {}
        return create(name, pretrained=pretrained, **overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_here)
    assert models.load_trained(None, name="test_vit", pretrained=True, device=CPU).model.num_classes == 1000
    with pytest.raises(ValueError, match=r"--num-classes=3, but the weights of test_vit have 1000 outputs.*fine-tune"):
        models.load_trained(None, name="test_vit", pretrained=True, classes=3, device=CPU)


@pytest.mark.parametrize("name", ["vig_t", "test_vit", "test_vmamba"])
def test_a_file_without_a_classifier_is_refused(tmp_path, name):
    tensors = golden.state_dict(golden.load(name)[0]) if name == "vig_t" else timm.create_model(name).state_dict()
    encoder = {key: value for key, value in tensors.items() if not key.startswith("head")}
    assert len(encoder) < len(tensors)
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"encoder\.pth"):
        models.load_trained(str(tmp_path / "encoder.pth"), name=name, device=CPU)


def test_files_go_through_timms_own_filter(tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    as_open_clip_saves = {f"visual.trunk.{key}": value for key, value in model.state_dict().items()}
    torch.save(as_open_clip_saves, tmp_path / "a.pth")
    timms = models.load_trained(str(tmp_path / "a.pth"), name="test_vit", classes=5, device=CPU).model
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(timms(images), model.eval()(images))


def test_a_checkpoint_of_train_says_its_own_number_of_classes(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    content = {"recipe": {"model": {"name": "test_vit", "kwargs": {}}}, "classes": ["a", "b", "c"]}
    checkpoint.save_weights(tmp_path / "best.safetensors", model.state_dict(), content)
    path = str(tmp_path / "best.safetensors")
    assert models.load_trained(path, device=CPU).classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"--num-classes=5, but .*best\.safetensors have 3 outputs"):
        models.load_trained(path, classes=5, device=CPU)


@pytest.mark.parametrize("given", ["file", "name"])
def test_a_folder_of_timms_says_all_of_its_model(tmp_path, given):
    torch.manual_seed(0)
    made = timm.create_model("test_vig", num_classes=7, img_size=128).eval()
    save_for_hf(made, tmp_path, model_config={"pretrained_cfg": {"mean": [0.25] * 3}})

    def load(**options):
        source = {"file": str(tmp_path)} if given == "file" else {"file": None, "name": f"local-dir:{tmp_path}"}
        return models.load_trained(**source, pretrained=given == "name", device=CPU, **options)

    trained = load()
    assert (trained.input.image_size, trained.input.mean, trained.outputs.count) == (128, [0.25] * 3, 7)
    images = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(trained.model(images), made(images))
    assert load(classes=7).model.num_classes == 7
    with pytest.raises(ValueError, match=rf"--num-classes=3, but the weights of .*{tmp_path.name} have 7 outputs"):
        load(classes=3)


def test_a_folder_of_another_model_is_refused(tmp_path):
    save_for_hf(timm.create_model("test_vig"), tmp_path)
    assert models.load_trained(str(tmp_path), name="test_vig", device=CPU).name == "test_vig"
    with pytest.raises(ValueError, match="holds a test_vig, not --model test_plain"):
        models.load_trained(str(tmp_path), name="test_plain", device=CPU)


def test_a_folder_without_timms_config(tmp_path):
    made = timm.create_model("test_vig").eval()
    save_for_hf(made, tmp_path, safe_serialization=True)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"config\.json that timm did not write"):
        models.load_trained(str(tmp_path), device=CPU)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="does not say which model it holds"):
        models.load_trained(str(tmp_path), device=CPU)
    again = models.load_trained(str(tmp_path), name="test_vig", device=CPU).model
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(again(images), made(images))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        models.load_trained(str(tmp_path), name="test_vig", device=CPU)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load_trained(None, name=f"local-dir:{tmp_path}", pretrained=True, device=CPU)
