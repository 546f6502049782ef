"""Weights from every source that timm takes: state dict, file, folder, hub, address, cache and published tag."""

import copy
import hashlib
import importlib.util
import json
import logging
import shutil
from dataclasses import replace

import golden
import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import _hub, save_for_hf

import visionmix
from visionmix.models import Weights
from visionmix.models.family import family_of, variant_of
from visionmix.models.registration import _entry_point

writes_sizes = pytest.mark.skipif(
    importlib.util.find_spec("timm.models._input") is None, reason="this timm does not write for which size a model is"
)
FORMS = {"safetensors": (True, ["model.safetensors"]), "bin": (False, ["pytorch_model.bin"])}
FORMS["both"] = ("both", ["model.safetensors", "pytorch_model.bin"])


def model(name="test_vig", **options):
    torch.manual_seed(1)
    return timm.create_model(name, **options).eval()


def saved(made, folder, form="safetensors", **about):
    """Return `folder`, to which timm has written `made`."""
    how, files = FORMS[form]
    save_for_hf(made, folder, model_config=about or None, safe_serialization=how)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", *files])
    return folder


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder by repository, which the downloads are served from; a file that is not there is not found."""
    calls = []

    def download(repo_id, filename, *, revision=None, cache_dir=None, **_):
        calls.append((repo_id, filename, revision, cache_dir))
        path = tmp_path / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {repo_id} has no {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    download.folder, download.calls = tmp_path / "me" / "mine", calls
    download.folder.mkdir(parents=True)
    return download


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["test_vig", "test_vmamba", "test_agent_deit_tiny", "test_dinat_isotropic"])
def test_local_folder_gives_back_the_saved_model(tmp_path, name, form):
    made = model(name, num_classes=5)
    again = timm.create_model(f"local-dir:{saved(made, tmp_path / 'saved', form)}", pretrained=True)
    assert again.num_classes == 5
    assert same(again, made)


@pytest.mark.parametrize("form", FORMS)
def test_hub_gives_back_what_was_pushed(hub, form):
    made = model(num_classes=3)
    labels = {"label_names": ["cat", "dog", "owl"], "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    saved(made, hub.folder, form, **labels)
    again = timm.create_model("hf-hub:me/mine", pretrained=True)
    assert same(again, made)
    cfg = again.pretrained_cfg
    assert (list(cfg["label_names"]), list(cfg["mean"]), list(cfg["std"])) == (
        ["cat", "dog", "owl"],
        *([[0.5] * 3, [0.25] * 3]),
    )


@pytest.mark.parametrize("form", FORMS)
def test_overlay_with_a_repository_alone(hub, form):
    made = model()
    saved(made, hub.folder, form)
    again = timm.create_model("test_vig", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/mine"})
    assert same(again, made)


def test_overlay_with_a_repository_does_not_keep_the_published_file_name(hub):
    made = model("vig_t")
    saved(made, hub.folder)
    again = timm.create_model("vig_t", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/mine"})
    assert same(again, made)
    assert "vig_t.pth" not in {file for _, file, _, _ in hub.calls}


def test_revision_and_cache_folder_reach_the_hub(hub, tmp_path):
    saved(model(), hub.folder)
    overlay = {"hf_hub_id": "me/mine@v2", "hf_hub_filename": "model.safetensors"}
    timm.create_model("test_vig", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path))
    assert hub.calls == [("me/mine", "model.safetensors", "v2", str(tmp_path))]


def test_repository_without_weights_says_which_files_were_looked_for(hub):
    overlay = {"hf_hub_id": "me/mine"}
    with pytest.raises(ValueError, match=r"me/mine/model\.safetensors or pytorch_model\.bin cannot be fetched.*file="):
        timm.create_model("test_vig", pretrained=True, pretrained_cfg_overlay=overlay)


def test_offline_hub_reads_its_cache(tmp_path, monkeypatch):
    """A cache as the hub's library lays it out, and no network."""
    made = model(num_classes=4)
    snapshot = tmp_path / "models--me--mine" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    saved(made, snapshot)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path)
    assert same(again, made)
    with pytest.raises(ValueError, match="me/other/model"):
        timm.create_model(
            "test_vig", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/other"}, cache_dir=tmp_path
        )


@pytest.mark.parametrize("source", ["state_dict", "file", "folder"])
def test_overlay_with_tensors_file_or_folder(tmp_path, source):
    made = model()
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    where = {
        "state_dict": {"state_dict": made.state_dict()},
        "file": {"file": str(tmp_path / "model.safetensors")},
        "folder": {"file": str(tmp_path)},
    }[source]
    assert same(timm.create_model("test_vig", pretrained=True, pretrained_cfg_overlay=where), made)


@pytest.mark.parametrize("url", ["file", ("file", "mine.pth")])
def test_address_is_fetched_once_into_the_cache_folder(tmp_path, url):
    made = model()
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    address = (tmp_path / "weights.pth").as_uri()
    overlay = {"url": address if isinstance(url, str) else (address, url[1])}
    for _ in range(2):
        again = timm.create_model(
            "test_vig", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache"
        )
        assert same(again, made)
        (tmp_path / "weights.pth").unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["weights.pth" if isinstance(url, str) else url[1]]


def test_addresses_without_a_file_name_do_not_share_a_file(tmp_path, monkeypatch):
    """Two tags of a model at addresses that end in a folder: each is fetched."""
    fetched = []

    def download(url, path):
        fetched.append(url)
        torch.save(golden.state_dict(golden.load("agent_deit_tiny")[0]), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for url in (
        "https://example.org/f/one/?dl=1",
        "https://example.org/f/two/?dl=1",
        "https://example.org/f/one/?dl=1",
    ):
        timm.create_model("agent_deit_tiny", True, pretrained_cfg_overlay={"url": url}, cache_dir=tmp_path)
    assert [url.split("/")[-2] for url in fetched] == ["one", "two"]


def test_address_in_the_overlay_goes_before_the_registered_repository(tmp_path):
    made = model("vig_t")
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    overlay = {"url": (tmp_path / "weights.pth").as_uri()}
    again = timm.create_model("vig_t", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache")
    assert same(again, made)


def test_checksum_of_a_published_file(tmp_path, monkeypatch):
    made = model()
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    address = (tmp_path / "weights.pth").as_uri()
    overlay = {"url": address}
    variants = family_of("test_vig").variants
    right = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    for sha256 in (right, right.upper(), "0" * 64):
        variant = replace(variants["test_vig"], weights={"in1k": Weights(address, sha256=sha256)})
        entry = _entry_point("visionmix.models.vig", "test_vig", variant, "")
        options = {"pretrained_cfg_overlay": overlay, "cache_dir": tmp_path / "cache"}
        if sha256 == "0" * 64:
            with pytest.raises(ValueError, match=f"SHA-256 sum {right}"):
                entry(pretrained=True, **options)
        else:
            assert same(entry(pretrained=True, **options), made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("img_size", [96, 128])
def test_files_of_other_types(tmp_path, dtype, img_size):
    made = model("test_agent_deit_tiny").to(dtype)
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path)}
    again = timm.create_model("test_agent_deit_tiny", True, pretrained_cfg_overlay=overlay, img_size=img_size)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert torch.equal(again.head.fc.weight, made.head.fc.weight.float())
    again.eval()(torch.randn(1, 3, img_size, img_size))


def test_folder_of_other_classes_keeps_a_fresh_classifier(tmp_path, caplog):
    made = model(num_classes=5)
    folder = saved(made, tmp_path / "saved")
    with caplog.at_level(logging.WARNING, logger="visionmix"):
        again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert "classifier has 5 classes, num_classes=7" in caplog.text
    assert again.head.fc.weight.shape == (7, 48)
    assert torch.equal(again.norm.weight, made.norm.weight)
    assert torch.equal(again.blocks[2].mixer.qkv.weight, made.blocks[2].mixer.qkv.weight)


def test_folder_of_one_channel(tmp_path):
    made = model(in_chans=1)
    folder = saved(made, tmp_path / "saved")
    assert same(timm.create_model(f"local-dir:{folder}", pretrained=True), made)
    colour = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=3).eval()
    grey = torch.randn(1, 1, 96, 96)
    with torch.no_grad():
        assert torch.allclose(colour(grey.expand(-1, 3, -1, -1)), made(grey), atol=1e-5)


def test_folder_with_options_and_another_size(tmp_path):
    made = model("test_agent_swin", img_size=128, mixer=["linear", "linear", "agent", "softmax"], num_classes=2)
    folder = saved(made, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same(again, made)
    image = torch.randn(1, 3, 128, 128)
    assert torch.equal(again(image), made(image))


@writes_sizes
@pytest.mark.parametrize("later", [False, True], ids=["built", "set"])
@pytest.mark.parametrize("name", ["test_vig", "test_agent_swin", "test_raftmlp", "test_mambar_tiny"])
def test_folder_says_the_size_that_the_model_has(tmp_path, name, later):
    size = (128, 160)
    made = model(name) if later else model(name, img_size=size)
    untouched = copy.copy(made)
    if later:
        made.set_input_size(size)
        assert untouched.pretrained_cfg["input_size"] == (3, 96, 96)
    again = timm.create_model(f"local-dir:{saved(made, tmp_path / 'saved')}", pretrained=True).eval()
    image = torch.randn(1, 3, *size)
    rows, columns = made.forward_intermediates(image, 1, intermediates_only=True)[0].shape[-2:]
    for each in (made, again):
        cfg = each.pretrained_cfg
        assert (tuple(cfg["input_size"]), tuple(cfg["pool_size"])) == ((3, *size), (rows, columns))
        assert each.default_cfg is cfg
        assert resolve_data_config(model=each)["input_size"] == (3, *size)
    assert same(again, made)
    assert torch.equal(again(image), made(image))


@writes_sizes
def test_folder_keeps_the_images_that_its_author_wants(tmp_path):
    made = model(img_size=128)
    save_for_hf(made, tmp_path, data_config={"input_size": (3, 160, 160)})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (tuple(again.pretrained_cfg["input_size"]), again.grid_size) == ((3, 160, 160), (8, 8))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
    assert (tuple(again.pretrained_cfg["input_size"]), again.grid_size) == ((3, 64, 64), (4, 4))


def test_folder_of_a_tag_is_built_as_the_tag_says(tmp_path):
    made = model("dinats_tiny.in1k", depths=(1, 1, 1, 1))
    folder = saved(made, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["architecture"], config["pretrained_cfg"]["tag"] = "dinats_large", "in22k_in1k_384"
    config["model_args"] |= {"embed_dims": [96, 192, 384, 768], "num_heads": [3, 6, 12, 24]}
    (folder / "config.json").write_text(json.dumps(config))
    again = timm.create_model(f"local-dir:{folder}", pretrained=False, depths=(2, 2, 2, 2))
    assert [stage.blocks[1].mixer.dilation for stage in again.stages] == [[13, 13], [6, 6], [3, 3], [1, 1]]


def test_folders_that_hold_no_weights(tmp_path):
    folder = saved(model(), tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


TAGGED = {
    f"{name}.{tag}": weights
    for name in visionmix.models.list_family_models()
    for tag, weights in variant_of(name).weights.items()
}


def test_every_tag_is_registered_with_its_facts():
    fetched = {name for name, weights in TAGGED.items() if weights.url or weights.hf_hub_id}
    assert fetched == set(timm.list_pretrained(list(fetched)))
    for name, weights in TAGGED.items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == weights.num_classes
        assert cfg.license == visionmix.models.published(name).license
        if weights.input_size is not None:
            assert cfg.input_size == (3, weights.input_size, weights.input_size)
            assert cfg.crop_pct == (weights.crop_pct or 1.0)


def test_timm_crops_test_images_as_the_authors_did():
    crops = {}
    for name, weights in TAGGED.items():
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        assert config["crop_mode"] == weights.crop_mode
        crops[name] = config["crop_mode"], config["crop_pct"]
    squashed = {name for name, (mode, _) in crops.items() if mode == "squash"}
    of_512 = {"mambavision_large2.in21k_in1k_512", "mambavision_large3.in21k_in1k_512"}
    of_384 = {"transnext_small.in1k_384", "transnext_base.in1k_384", "l2vit_base.in22k_in1k_384"}
    others = {name for name in TAGGED if name.startswith(("agent_", "flatten_", "inline_", "polaformer_"))}
    of_1024 = {"her_encoder.sam"}
    assert squashed == others | of_512 | of_384 | of_1024
    assert {crops[name] for name in of_512} == {("squash", 0.93)}
    # Of the published cfgs, three say TEST.CROP: False; TransNeXt's code crops nothing from 384 pixels on.
    whole = of_384 | of_1024 | {"agent_swin_small.in1k_288", "agent_swin_base.in1k_384", "flatten_swin_base.in1k_384"}
    assert {name for name in squashed - of_512 if crops[name][1] == 1.0} == whole
    assert {crops[name][1] for name in squashed - of_512 - whole} == {0.875}


SIZED = [name for name, weights in TAGGED.items() if weights.input_size or weights.options]
# One a family in the quick suite.
_FIRST = {name.partition("_")[0]: name for name in reversed(SIZED)}.values()


@pytest.mark.parametrize("name", [n if n in _FIRST else pytest.param(n, marks=pytest.mark.long) for n in SIZED])
def test_tag_of_another_size_builds_the_model_for_it(name):
    with torch.device("meta"):
        tagged = timm.create_model(name)
        built = timm.create_model(name.partition(".")[0], img_size=TAGGED[name].input_size, **TAGGED[name].options)
    assert tagged.pretrained_cfg["tag"] == name.partition(".")[2]
    shapes = {key: value.shape for key, value in tagged.state_dict().items()}
    assert shapes == {key: value.shape for key, value in built.state_dict().items()}


@pytest.mark.parametrize("name", [name for name, weights in TAGGED.items() if weights.num_classes != 1000])
def test_tag_of_other_classes_builds_them(name):
    assert TAGGED[name].num_classes == (0 if name == "her_encoder.sam" else 21841)
    with torch.device("meta"):
        assert timm.create_model(name).num_classes == TAGGED[name].num_classes
        assert timm.create_model(name, num_classes=7).num_classes == 7


@pytest.mark.parametrize(
    "tag", [pytest.param("agent_swin_small.in1k_288", marks=pytest.mark.long), "agent_pvt_medium.in1k_256"]
)
def test_tag_loads_a_file_of_its_size(tmp_path, tag):
    name = tag.partition(".")[0]
    case = f"{name}__288x288" if "288" in tag else f"{name}__256x256"
    meta, arrays = golden.load(case)
    torch.save(golden.state_dict(meta), tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    with golden.quick_start():
        made = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        image = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"])
        assert golden.relative_error(made(image), arrays["logits"]) <= 1e-5


def test_unknown_tag_names_the_tags():
    with pytest.raises(ValueError, match=r"did you mean 'in1k_384'"):
        visionmix.models.published("agent_swin_base.in1k_348")


def test_facts_belong_to_the_weights():
    published = visionmix.models.published
    assert published("ravlt_small").license == "mit"
    assert published("mavit_small").top1 == 84.7
    assert (published("agent_swin_base").top1, published("agent_swin_base.in1k_384").top1) == (84.0, 84.9)
    assert (published("agent_swin_base").gmacs, published("agent_swin_base.in1k_384").gmacs) == (15.4, 46.3)
    assert published("nat_mini").paper != published("dinat_mini").paper
