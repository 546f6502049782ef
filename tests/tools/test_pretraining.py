"""Training without labels: unlabelled images, the model's own losses, the recipes, and fine-tuning after it."""

import csv
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from small_runs import CPU, make

from visionmix.tools import data, models, recipe, train
from visionmix.tools.evaluation import evaluate

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
SMALL = {"backbone": "test_roma_arm", "img_size": 64, "window": 2, "region": 2, "decoder_dim": 16, "decoder_depth": 2}
MODEL = {"name": "roma_pretraining", "kwargs": {**SMALL, "depth": 1}}


@pytest.fixture
def loose(tree):
    """Images without class folders: some in the split, some deeper."""
    for split in ("train", "val"):
        for path in sorted((tree / split).glob("red/*")):
            path.rename(tree / split / f"red_{path.name}")
        (tree / split / "red").rmdir()
        shutil.move(tree / split / "blue", tree / split / "green" / "blue")
    return tree


def begin(tree, **sections):
    settings = {"model": MODEL, "data": {"image_size": 64, "labels": False}} | sections
    return train.make_run(make(tree, **settings), [], CPU)


def test_images_without_labels_lie_anywhere(loose, tmp_path):
    wanted = make(loose, data={"labels": False}).data
    assert data.check_data(wanted) == []
    for split, count in (("train", 18), ("val", 9)):
        images = data.open_split(wanted, split, [])
        assert len(images) == count
        assert images.load(count - 1)[1] == 0
    wanted.labels = True
    with pytest.raises(ValueError, match="outside class folders"):
        data.check_data(wanted)
    for split in ("train", "val"):
        (tmp_path / "none" / split).mkdir(parents=True)
    wanted.path, wanted.labels = str(tmp_path / "none"), False
    with pytest.raises(ValueError, match="holds no images that Pillow decodes"):
        data.open_split(wanted, "train", [])
    (tmp_path / "none" / "train.csv").write_text("image,labels\na.jpg,red\n")
    with pytest.raises(ValueError, match=r"data\.labels=False reads image folders alone"):
        data.check_data(wanted)


def test_a_run_lowers_the_models_own_losses_and_a_classifier_goes_on(loose, tmp_path, capsys):
    settings = {
        "model": MODEL,
        "data": {"image_size": 64, "batch_size": 6, "workers": 0, "crop_pct": 1.0, "labels": False},
        "augment": {"scale": [1.0, 1.0], "color_jitter": 0.0},
        "optimizer": {"lr": 3e-3, "lr_batch": None},
        "schedule": {"epochs": 4, "warmup_epochs": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    call = [str(tmp_path / "run.yaml"), "--data", str(loose), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert train.main([*call, "--set", "schedule.stop_epoch=2"]) == 0
    assert train.main([*call, "--resume", "--set", "schedule.stop_epoch=4"]) == 0
    text = capsys.readouterr().out
    assert "no classes, 18 train and 9 test images" in text
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert "test_top1" not in rows[0]
    losses = {name: [float(row[name]) for row in rows] for name in ("train_loss", "test_loss")}
    assert losses["train_loss"][-1] < 0.97 * losses["train_loss"][0]
    assert losses["test_loss"][-1] < losses["test_loss"][0]
    for row in rows:
        parts = float(row["loss_patches"]) + float(row["loss_regions"])
        assert float(row["train_loss"]) == pytest.approx(parts, rel=1e-5)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"curves.png"}
    best = min(range(4), key=losses["test_loss"].__getitem__) + 1
    assert f"(best epoch {best}: {min(losses['test_loss']):.3f})" in text
    file = tmp_path / "out" / "best.safetensors"
    with pytest.raises(ValueError, match="was trained without labels and guesses no classes"):
        models.load_trained(str(file), device=CPU)
    options = {"depth": 1, "pretrained_cfg_overlay": {"file": str(file)}}
    fine = timm.create_model("test_roma_arm", pretrained=True, num_classes=3, **options)
    fresh = timm.create_model("test_roma_arm", num_classes=3, depth=1)
    weight = fine.blocks[0].mixer.scans[3].x_proj.weight
    assert torch.equal(weight, fine.blocks[0].mixer.scans[0].x_proj.weight)
    assert not torch.equal(weight, fresh.blocks[0].mixer.scans[3].x_proj.weight)


def test_the_test_takes_the_mean_of_the_own_losses_over_images(loose):
    trainer, _, loader = begin(loose)
    result = evaluate(trainer.model, loader, classes=0, device=CPU, labels=False)
    assert (result.count, result.figures, result.targets) == (9, {}, None)
    images = torch.cat([batch.images for batch in loader])
    with torch.no_grad():
        each = [sum(trainer.model.eval().forward_train(image[None])[1].values()) for image in images]
    assert result.loss == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_a_model_without_losses_of_its_own_is_refused(loose):
    with pytest.raises(ValueError, match=r"data\.labels=False trains by the .* losses, and 'test_vig' has none"):
        begin(loose, model={"name": "test_vig"})


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("data", "classes", 3), ("augment", "mixup", 0.8), ("augment", "cutmix", 1.0), ("augment", "splits", 2),
        ("train", "loss", "bce"), ("train", "mesa", 1.0), ("distill", "teacher", "vig_s"),
    ],
)  # fmt: skip
def test_what_needs_labels_is_refused_without_them(section, option, value):
    settings = {"data": {"labels": False}, "train": {"ema_decay": 0.9}}
    if option == "splits":
        settings["train"]["loss"] = "jsd"
    settings.setdefault(section, {})[option] = value
    with pytest.raises(ValueError, match=rf"{section}\.{option}=.* needs labels, and data\.labels is false"):
        recipe.from_dict(settings, "test")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_recipe_pretrains_its_own_backbone(name):
    made = recipe.read(str(CONFIGS / f"{name}.yaml"))
    assert made.model.kwargs == {"backbone": name}
    assert not made.data.labels
    with torch.device("meta"):
        model = timm.create_model(made.model.name, **made.model.kwargs)
    assert model.backbone.grid_size == (12, 12) == (made.data.image_size // 16,) * 2
    assert model.read_after == [6, 8, 10, 12]


def test_a_recipe_takes_two_steps(loose):
    settings = recipe.to_dict(recipe.read(str(CONFIGS / "roma_arm_base.yaml")))
    settings["model"]["kwargs"] = MODEL["kwargs"]
    settings["data"] |= {"path": str(loose), "image_size": 64, "batch_size": 8, "workers": 0}
    trainer, loader, _ = train.make_run(recipe.from_dict(settings, "test"), [], CPU)
    for batch in loader:
        assert torch.isfinite(trainer._update(batch))
    assert trainer.step == 2
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.05}
