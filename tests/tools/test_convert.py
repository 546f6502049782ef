"""Published files become folders that timm reads, with licence, source and citation; or are refused."""

import argparse
import json
import shutil

import golden
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import _hub, push_to_hf_hub

from visionmix.models import Published
from visionmix.tools import checkpoint, convert
from visionmix.tools.model_card import citation


@pytest.fixture(autouse=True)
def quick_start():
    with golden.quick_start():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return what stands for the published file of ViG-T, with a configuration object inside."""
    path = tmp_path_factory.mktemp("published") / "vig_t.pth"
    torch.save({"model": golden.state_dict(golden.load("vig_t")[0]), "config": argparse.Namespace(lr=0.1)}, path)
    return path


def call(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_a_folder_gives_the_published_logits_and_says_whose_they_are(file, tmp_path, capsys):
    out = tmp_path / "new" / "vig_t"
    (tmp_path / "licence.txt").write_text("MIT, of its authors")
    assert call(file, "vig_t", out, "--licence-file", tmp_path / "licence.txt") == 0, capsys.readouterr().err
    assert sorted(each.name for each in out.iterdir()) == ["LICENSE", "README.md", "config.json", "model.safetensors"]
    assert [each.name for each in out.parent.iterdir()] == ["vig_t"]
    assert len({(out / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1
    meta, arrays = golden.load("vig_t")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        assert golden.relative_error(model(golden.image(*meta["image_size"])), arrays["logits"]) < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["license"], config["pretrained_cfg"]["license"]) == ("vig_t", "mit", "mit")
    assert config["pretrained_cfg"]["paper_ids"] == ["2405.18425"]
    assert config["source"]["file"] == "vig_t.pth"
    assert len(config["source"]["sha256"]) == 64
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert "eprint = {2405.18425}" in card.text
    assert "mit, that of the authors" in card.text


def test_what_is_pushed_to_the_hub_comes_back(file, tmp_path, monkeypatch):
    """The hub is a folder here."""
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return argparse.Namespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, **_):
            return (hub / repo_id / filename).is_file()

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, **_):
        return str(hub / repo_id / filename)

    assert call(file, "vig_t", tmp_path / "folder") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    shutil.copytree(tmp_path / "folder", hub / "me" / "folder")  # hf upload me/folder FOLDER
    monkeypatch.setattr(_hub, "HfApi", Api)
    push_to_hf_hub(model, "me/pushed", safe_serialization=True)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    images = golden.image(224, 224)
    for name in ("me/folder", "me/pushed"):
        again = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
        with torch.inference_mode():
            assert torch.equal(again(images), model(images))
    pushed = json.loads((hub / "me" / "pushed" / "config.json").read_text())
    assert pushed["pretrained_cfg"]["license"] == "mit"


@pytest.mark.parametrize(
    ("own", "accepted", "settled"),
    [
        ("mit", None, "mit"),
        ("apache-2.0", "Apache-2.0", "apache-2.0"),
        ("agpl-3.0", "agpl-3.0", "agpl-3.0"),
        ("unknown", "unknown", "unknown"),
        ("unknown", "mit", "mit"),
        ("unknown", None, "authors of m state no licence.*--accept-licence unknown"),
        ("cc-by-nc-sa-4.0", None, "sets conditions.*--accept-licence cc-by-nc-sa-4.0"),
        ("cc-by-nc-sa-4.0", "mit", "mit is not the licence of m, which is cc-by-nc-sa-4.0"),
    ],
)
def test_the_licence_decides(own, accepted, settled):
    facts = Published(license=own)
    if " " not in settled:
        assert convert.settle_licence(facts, accepted, "m") == settled
        return
    with pytest.raises(ValueError, match=settled):
        convert.settle_licence(facts, accepted, "m")


@pytest.mark.parametrize(("accepted", "header"), [("unknown", "unknown"), ("mit", "mit"), ("special-2", "other")])
def test_a_card_says_who_states_the_licence(tmp_path, accepted, header, capsys):
    """The authors of MSVMamba state none."""
    file = tmp_path / "m.pth"
    torch.save(golden.state_dict(golden.load("msvmamba_nano")[0]), file)
    assert call(file, "msvmamba_nano", tmp_path / "refused") == 2
    assert "state no licence" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert call(file, "msvmamba_nano", tmp_path / "out", "--accept-licence", accepted) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == header
    assert ("not to be passed on" in card.text) == (accepted == "unknown")
    assert ("as the one who converted the weights states" in card.text) == (accepted != "unknown")


def test_other_files_and_folders_are_refused_and_nothing_is_written(file, tmp_path, capsys):
    checkpoint.save_weights(tmp_path / "own.safetensors", {"a": torch.ones(1)}, {"recipe": {}, "classes": []})
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for arguments, message in [
        ((file, "vig_s", tmp_path / "out"), "vig_t.pth"),
        ((file, "vig_tt", tmp_path / "out"), "did you mean 'vig_t'"),
        ((file, "vig_t", full), "is there already"),
        ((file, "vig_t", tmp_path / "link"), "is there already"),
        ((file, "vig_t", full / "a" / "b"), "lies below"),
        ((tmp_path / "none.pth", "vig_t", tmp_path / "out"), "does not exist"),
        ((tmp_path / "own.safetensors", "vig_t", tmp_path / "out"), "was trained here"),
        ((file, "vig_t", tmp_path / "out", "--licence-file", tmp_path / "none"), "--licence-file"),
    ]:
        assert call(*arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full", "link", "own.safetensors"]


def test_a_folder_that_timm_reads_otherwise_is_not_written(file, tmp_path, monkeypatch, capsys):
    save = convert.save_for_hf

    def damaged(model, folder, **options):
        save(model, folder, **options)
        state = {key: value + 1e-3 for key, value in model.state_dict().items()}
        checkpoint.save_weights(folder / "model.safetensors", state, {})

    monkeypatch.setattr(convert, "save_for_hf", damaged)
    assert call(file, "vig_t", tmp_path / "out") == 2
    assert "makes another model of the folder; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_citations():
    assert citation("arXiv 2401.10166, arXiv 2209.15001").count("@misc{arxiv_2") == 2
    assert citation("no paper: skeletons") == "no paper: skeletons"
