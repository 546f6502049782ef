"""The recipes of imagenet/ and finetune/: one for every published model, each trained for two steps on fake images.

A recipe is trained with its family's tiny model in place of its own: the settings are the recipe's.
"""

import copy
import dataclasses
import functools
import math
import re
from pathlib import Path

import golden
import pytest
import timm
import torch
import yaml
from small_runs import CLASSES, CPU, begin, go_on, save

from visionmix.models.family import family_of, list_family_models
from visionmix.tools import recipe, train
from visionmix.tools.recipe_checks import check_values

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.stem: path for path in sorted((CONFIGS / "imagenet").glob("*.yaml"))}
FINE = {path.stem: path for path in sorted((CONFIGS / "finetune").glob("*.yaml"))}
GENERAL = {"defaults", "bakeoff"}  # of no model in particular

# Models without a recipe from scratch, by pattern, and why.
WITHOUT = {
    r"her_encoder": "taught by the image encoder of SAM, without labels",
    r"ecoformer_pvt_v2_b\d": "trained from PVTv2s with softmax attention, whose weights are not published",
    r"dynamicvit_deit_256": "trained from a DeiT of 256 channels, whose weights are not published",
    r"mamba_yolo_\w+_backbone": "trained inside its detector alone",
    r"(pyramid|plain)_(nano|tiny|small)": "no published model: bakeoff.yaml trains it",
    r"dinats?_large": "trained on ImageNet-22k, by settings that are not published; finetune/ goes on from there",
    r"mambavision_large3": "trained on ImageNet-21k alone, by settings that are not published",
    r"roma_arm_\w+": "pre-trained on remote sensing images, without labels",
    r"segman_large_encoder": "its drop path is not published",
    r"van_b[456]": "trained on ImageNet-22k first: van_b4_22k.yaml and finetune/van_b4.yaml",
    r"vim_\w+_stride8": "fine-tuned from the model of stride 16: finetune/",
}

# The tiny model of a recipe, by pattern of the model's name: the first that matches.
TINY = {
    r"(agent|flatten|inline|polaformer)_(pvt_v2|pvt|swin|cswin)": r"test_\1_\2",
    r"agent_deit": "test_agent_deit_tiny",
    r"(inline|slab)_(deit|pvt|swin|cswin)": r"test_\1_\2",
    r"(swin|pvt)_\w+_prepbn": r"test_\1_prepbn",
    r"deit_\w+_prepbn": "test_slab_deit",
    r"vig_h": "test_vig_h",
    r"vmamba_\w+_v0": "test_vmamba_v0",
    r"(di)?nat_isotropic": "test_dinat_isotropic",
    r"(di)?nats?": "test_dinat",
    r"vim_": "test_vim_tiny",
    r"local_vim_tiny_middle_cls_token": "test_local_vim_middle_cls_token",
    r"(local_vim|local_vmamba)": r"test_\1",
    r"mambar": "test_mambar_tiny",
    r"(atrous_vmamba|care|efficient_vmamba|hrvmamba|mambavision|mavit|mila|msvmamba|msvmambav3)_": r"test_\1",
    r"(convnext_dcls|flowformer|plainmamba|plstm_vis|raftmlp|ravlt|sgformer|spatial_mamba|transnext)_": r"test_\1",
    r"(dualtoken_vit|fmvit|l2vit|m2_vit|nalaformer|s2aformer|soft|softpp)_": r"test_\1",
    r"(a2mamba|dynamicvit|favit|van|vig|vil|vim2|vir|vmamba|vssd)_": r"test_\1",
    r"segman_\w+_encoder": "test_segman_encoder",
    r"stvit_r_swin_": "test_stvit_r_swin",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory, make_images):
    """Images of two steps of four."""
    return make_images(tmp_path_factory.mktemp("images"), train=3, val=1)


@pytest.fixture(scope="module", autouse=True)
def files_read_once():
    """Read a base that many recipes share, and check its options, once."""
    read = functools.cache(recipe._read_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_read_file", lambda path, seen=(): copy.deepcopy(read(path)))
        yield


def written(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def first_of_each_base(paths: dict[str, Path]) -> list:
    """Return the names, all but one of each base marked as long."""
    seen, marked = set(), []
    for name, path in paths.items():
        base = written(path).get("base")
        marked.append(pytest.param(name, marks=pytest.mark.long) if base in seen else name)
        seen.add(base)
    return marked


def tiny(name: str) -> str:
    """Return the tiny model that stands for the one called `name`."""
    pattern, model = next((pattern, model) for pattern, model in TINY.items() if re.match(pattern, name))
    return re.match(pattern, name).expand(model)


def two_steps(tree: Path, path: Path, **sections) -> tuple:
    """Train by the recipe for two steps of four images and return (recipe, trainer)."""
    made = recipe.read(str(path))
    name = sections.get("model", {}).get("name") or tiny(made.model.name)
    kwargs = {key: value for key, value in made.model.kwargs.items() if key == "drop_path_rate"}
    size = 64 if name.startswith("test_") else 32
    changed = {
        "model": {"name": name, "pretrained": False, "kwargs": kwargs},
        # Autocast to float16 takes seconds a step on a CPU, and is no setting of the optimisation.
        "train": {"amp": "none" if made.train.amp == "float16" else made.train.amp},
        "data": {"path": str(tree), "batch_size": 4, "workers": 0, "image_size": size},
    }
    for section in {**changed, **sections}:
        options = changed.get(section, {}) | sections.get(section, {})
        changed[section] = dataclasses.replace(getattr(made, section), **options)
    tried = dataclasses.replace(made, **changed)
    check_values(tried, str(path))
    trainer, loader, _ = train.make_run(tried, CLASSES, CPU)
    go_on(trainer, loader, 1)
    return made, trainer


def check_steps(made: recipe.Recipe, trainer) -> None:
    assert trainer.step == 2
    assert math.isfinite(trainer.history[0]["train_loss"])
    assert (trainer.ema is not None) == (made.train.ema_decay is not None)
    # The settings reached the optimiser: decay only where the model takes it, the peak rate for this batch.
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, made.optimizer.weight_decay}


SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def small_teacher(tmp_path: Path) -> dict:
    """Return the section of a small teacher; the published one exists and has the classes of ImageNet."""
    checkpoint = save(tmp_path / "teacher", begin(model={"name": "vit_tiny_patch16_224", "kwargs": SMALL}))
    return {"teacher": None, "checkpoint": str(checkpoint)}


def check_teacher(made: recipe.Recipe, trainer) -> None:
    assert math.isfinite(trainer.own_losses["distill"])
    assert timm.get_pretrained_cfg(made.distill.teacher).num_classes == 1000


@pytest.mark.parametrize("name", first_of_each_base({name: RECIPES[name] for name in RECIPES if name not in GENERAL}))
def test_a_recipe_takes_two_steps(tree, tmp_path, name):
    distilled = recipe.read(str(RECIPES[name])).distill.on
    sections = {"data": {"image_size": 32}, "distill": small_teacher(tmp_path)} if distilled else {}
    made, trainer = two_steps(tree, RECIPES[name], **sections)
    check_steps(made, trainer)
    if distilled:
        check_teacher(made, trainer)


def test_every_published_model_has_a_recipe():
    missing = [
        name
        for name in list_family_models()
        if not name.startswith("test_")
        and name not in RECIPES
        and not any(re.fullmatch(pattern, name) for pattern in WITHOUT)
    ]
    assert missing == []
    for pattern in WITHOUT:
        assert [name for name in list_family_models() if re.fullmatch(pattern, name)], f"{pattern} is of no model"
        assert not [name for name in RECIPES if re.fullmatch(pattern, name)], f"{pattern} has a recipe"


def test_a_recipe_names_its_model_its_source_and_its_drop_path():
    """The name is the model's; what follows it is the tag's image size, the data, or a further part of the training."""
    for name in RECIPES.keys() - GENERAL:
        tree = written(RECIPES[name])
        model, _, tag = tree["model"]["name"].partition(".")
        assert timm.is_model(model), name
        assert family_of(model).paper, name
        assert name.removeprefix(model) in ("", "_224", "_22k", tag.removeprefix("in1k"))
        assert RECIPES[name].read_text().startswith("# "), name
        assert "arXiv" in RECIPES[name].read_text() + (RECIPES[name].parent / tree["base"]).read_text(), name
        assert 0 <= tree["model"]["kwargs"]["drop_path_rate"] < 1, name
        if tag:
            size = timm.get_pretrained_cfg(f"{model}.{tag}").input_size[-1]
            assert tree["data"]["image_size"] == size, name


def test_recipes_test_as_the_published_weights_were_tested():
    """Of Agent, FLatten and InLine, whose images are squashed and, at some sizes, not cropped."""
    paths, modes = RECIPES | FINE, set()
    for name in timm.list_pretrained(["agent_*.in1k*", "flatten_*.in1k*", "inline_*.in1k*"]):
        made, cfg = recipe.read(str(paths[name.replace(".in1k", "")])).data, timm.get_pretrained_cfg(name)
        assert (made.crop_mode, made.crop_pct, made.image_size) == (cfg.crop_mode, cfg.crop_pct, cfg.input_size[-1])
        modes.add((cfg.crop_mode, cfg.crop_pct))
    assert modes == {("squash", 0.875), ("squash", 1.0)}


@pytest.mark.long
@pytest.mark.parametrize(
    "path", [*RECIPES.values(), *FINE.values()], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_recipes_own_model_is_built(path):
    made = recipe.read(str(path))
    with golden.quick_start():
        model = timm.create_model(made.model.name, num_classes=7, **made.model.kwargs)
    assert model.num_classes == 7


def fake_weights(tmp_path, name: str, **kwargs) -> dict:
    """Return kwargs by which the model called `name` starts from a file of its fresh weights, of 7 classes."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7, **kwargs)
    torch.save(model.state_dict(), tmp_path / "published.pt")
    return {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pt"), "num_classes": 7}}


@pytest.mark.parametrize(
    "name", first_of_each_base({name: path for name, path in FINE.items() if not name.startswith(("distill", "evit"))})
)
def test_fine_tuning_starts_from_weights_and_takes_two_steps(tree, tmp_path, name):
    """Of a smaller image size and other classes: the last block is the file's at the start, the classifier is not."""
    model = tiny(written(FINE[name])["model"]["name"].partition(".")[0])
    size = timm.get_pretrained_cfg(model).input_size[-1]
    kwargs = fake_weights(tmp_path, model)
    sections = {"model": {"name": model, "pretrained": True, "kwargs": kwargs}, "optimizer": {"lr": 0.0}}
    sections |= {"schedule": {"warmup_lr": 0.0, "min_lr": 0.0}}
    made, trainer = two_steps(tree, FINE[name], **sections)
    assert made.model.pretrained
    assert made.data.image_size >= 224 > size
    check_steps(made, trainer)
    started = torch.load(tmp_path / "published.pt")
    ends = trainer.model.state_dict()
    same = [key for key in started if started[key].shape == ends[key].shape and torch.equal(started[key], ends[key])]
    learned = {key for key, _ in trainer.model.named_parameters()}
    assert {key for key in learned if not key.startswith("head.fc")} == {key for key in same if key in learned}
    assert made.optimizer.lr > 0


def test_evit_is_fine_tuned_from_the_weights_of_the_whole_model(tree, tmp_path):
    small = SMALL | {"depth": 4, "patch_size": 4}
    kwargs = small | fake_weights(tmp_path, "vit_tiny_patch16_224", **small)
    model = {"name": "vit_tiny_patch16_224", "pretrained": True, "kwargs": kwargs}
    still = {"optimizer": {"lr": 0.0}, "schedule": {"warmup_lr": 0.0, "min_lr": 0.0}, "data": {"image_size": 32}}
    made, trainer = two_steps(tree, FINE["evit_deit_small"], model=model, **still)
    check_steps(made, trainer)
    assert made.model.pretrained
    assert timm.get_pretrained_cfg(made.model.name).num_classes == 1000
    started = torch.load(tmp_path / "published.pt")
    ends = trainer.model.state_dict()
    assert all(torch.equal(value, started[key]) for key, value in ends.items() if not key.startswith("head"))
    assert trainer.model.reduction.keep_rate == (1.0, 0.7, 0.7, 0.7)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vim_tiny_stride8", {"depth": 1}),
        ("agent_swin_base_384", {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}),
        ("agent_cswin_base_384", {"depths": (1, 1, 1, 1)}),
        ("mambar_base_final", {"depth": 1}),
    ],
)
def test_a_model_takes_weights_of_the_earlier_size(tmp_path, name, kwargs):
    """The recipe's own model, one block a stage, reads what the training before it leaves."""
    made = recipe.read(str(FINE[name]))
    model = made.model.name.partition(".")[0]
    options = {key: value for key, value in made.model.kwargs.items() if key != "pretrained_cfg_overlay"}
    overlay = fake_weights(tmp_path, model, **kwargs)
    fine = timm.create_model(model, pretrained=True, num_classes=3, **kwargs, **options, **overlay)
    assert fine.num_classes == 3
    with torch.no_grad():
        assert fine.eval()(torch.zeros(1, 3, made.data.image_size, made.data.image_size)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "model", "kwargs"),
    [("distill_tokens", "deit_tiny_distilled_patch16_224", SMALL), ("distill_logits", "test_vig", {})],
)
def test_distillation_takes_two_steps(tree, tmp_path, name, model, kwargs):
    model = {"name": model, "kwargs": kwargs}
    distill = small_teacher(tmp_path)
    made, trainer = two_steps(tree, FINE[name], model=model, data={"image_size": 32}, distill=distill)
    check_steps(made, trainer)
    check_teacher(made, trainer)


def test_the_last_parts_weights_are_those_of_the_one_before():
    """A recipe that goes on from a file names the output of one that there is."""
    for path in (*RECIPES.values(), *FINE.values()):
        overlay = written(path).get("model", {}).get("kwargs", {}).get("pretrained_cfg_overlay", {})
        if "file" in overlay:
            assert Path(overlay["file"]).parent.name in RECIPES
            assert Path(overlay["file"]).parent.name != path.stem  # output/RECIPE is where a run writes
    assert not RECIPES.keys() & FINE.keys()
