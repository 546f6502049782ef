"""Crops of training and test images, and batch norms of several views: each against the definition, by hand."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import CPU, begin, best_of, make, run, save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.layers import SplitBatchNorm2d
from torch import nn
from torch.nn import functional as F

from visionmix.tools import data, models, predict, predictions, train, validate
from visionmix.tools.checkpoint import read

NORMALISE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
PLAIN = {"hflip": 0.0, "color_jitter": 0.0}
VIEWS = {"augment": {"splits": 2}, "train": {"loss": "jsd", "split_bn": True}}


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose red says the column and whose green says the row, 4 a pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def windows(crop_pct: float, padding: int, image: Image.Image, count: int = 60) -> list[np.ndarray]:
    augment = {**PLAIN, "crop_mode": "simple", "crop_padding": padding}
    transform = data.train_transform(
        make(None, data={"image_size": 28, "crop_pct": crop_pct}, augment=augment), NORMALISE
    )
    found = []
    for seed in range(count):
        with data.Repeatable(seed):
            found.append(np.moveaxis(transform(image).numpy(), 0, -1).astype(int))
    return found


def test_a_simple_crop_is_a_window_of_one_scale():
    image = gradient(40, 32)  # 28 / 0.875: no resizing
    pixels, places = np.asarray(image).astype(int), set()
    for window in windows(0.875, 0, image):
        left, top = window[0, 0, 0] // 4, window[0, 0, 1] // 4
        assert np.array_equal(window, pixels[top : top + 28, left : left + 28])
        places.add((left, top))
    assert {left for left, _ in places} == set(range(13))
    assert {top for _, top in places} == set(range(5))


def test_a_simple_crop_may_lie_in_reflected_padding():
    image = gradient(28, 28)
    padded = np.pad(np.asarray(image).astype(int), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    places = {(y, x): padded[y : y + 28, x : x + 28].tobytes() for y in range(9) for x in range(9)}
    found = {window.tobytes() for window in windows(1.0, 4, image, 100)}
    assert found <= set(places.values())
    assert len(found) > 40


def test_a_simple_crop_is_the_same_for_all_views():
    made = make(None, **VIEWS | {"augment": {**PLAIN, "crop_mode": "simple", "splits": 2}}, data={"image_size": 28})
    with data.Repeatable(3):
        pixels, _ = data.train_transform(made, NORMALISE)(gradient(40, 32))
    assert pixels.shape == (2, 3, 28, 28)
    assert torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_other_crops_are_those_of_timm(mode):
    augment = {**PLAIN, "crop_mode": mode, "scale": [0.5, 1.0], "ratio": [0.8, 1.25]}
    ours = data.train_transform(make(None, augment=augment), NORMALISE)
    theirs = create_transform(
        32, is_training=True, train_crop_mode=mode, scale=(0.5, 1.0), ratio=(0.8, 1.25), hflip=0, color_jitter=None,
        interpolation="bicubic", normalize=False,
    )  # fmt: skip
    for seed in range(6):
        with data.Repeatable(seed):
            found = ours(gradient(60, 40))
        with data.Repeatable(seed):
            assert torch.equal(found, theirs(gradient(60, 40)))


def test_test_images_are_resized_by_the_mode():
    image = gradient(60, 30)
    seen = {mode: data.eval_transform(32, "bicubic", 1.0, NORMALISE, mode)(image) for mode in
            ("center", "squash", "border")}  # fmt: skip
    squashed = torch.tensor(np.asarray(image.resize((32, 32), Image.BICUBIC))).movedim(-1, 0) / 127.5 - 1
    torch.testing.assert_close(seen["squash"], squashed)
    half = image.resize((64, 32), Image.BICUBIC).crop((16, 0, 48, 32))
    torch.testing.assert_close(seen["center"], torch.tensor(np.asarray(half)).movedim(-1, 0) / 127.5 - 1)
    assert seen["border"][:, [0, -1]].abs().max() < 0.01  # the mean colour, above and below


@pytest.mark.usefixtures("small")
def test_the_recipes_crop_mode_is_that_of_tests_and_of_the_checkpoint(tree):
    trainer, _, tests = train.make_run(make(tree, data={"crop_mode": "squash"}), ["blue", "green", "red"], CPU)
    image = gradient(60, 30)
    squash = data.eval_transform(32, "bicubic", 1.0, trainer.input.normalise, "squash")
    assert torch.equal(tests.dataset.transform(image), squash(image))
    assert trainer.input.crop_mode == trainer.state()["input"]["crop_mode"] == "squash"
    # Checkpoints of earlier versions do not say it.
    old = {key: value for key, value in trainer.input.to_dict().items() if key != "crop_mode"}
    assert models.model_input(trainer.model, **old).crop_mode == "center"


def test_validate_and_predict_resize_as_the_weights_were_tested(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("agent_deit_tiny", num_classes=2).eval()
    nn.init.normal_(model.get_classifier().weight, std=0.05)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    for name in ("one", "two"):
        (tmp_path / "val" / name).mkdir(parents=True)
        gradient(60, 30).save(tmp_path / "val" / name / "a.png")
    (tmp_path / "map").write_text("one 0\ntwo 1\n")
    images = {mode: data.eval_transform(224, "bicubic", 0.875, IMAGENET, mode)(gradient(60, 30)) for mode in
              ("squash", "center")}  # fmt: skip
    with torch.inference_mode():
        logits = {mode: model(image[None])[0] for mode, image in images.items()}
    likely = {mode: values.softmax(0) for mode, values in logits.items()}
    assert (likely["squash"] - likely["center"]).abs().max() > 1e-3
    call = ["--model", "agent_deit_tiny", "--checkpoint", str(tmp_path / "a.pth"), "--workers", "0", "--device", "cpu"]
    tested = [*call, "--data", str(tmp_path), "--class-map", str(tmp_path / "map"), "--json", str(tmp_path / "r.json")]
    assert validate.main(tested) == 0
    loss = -logits["squash"].log_softmax(0).mean().item()
    assert json.loads((tmp_path / "r.json").read_text())["loss"] == pytest.approx(loss, rel=1e-4)
    guessed = [str(tmp_path / "val" / "one" / "a.png"), *call, "--topk", "1", "--output", str(tmp_path / "p.csv")]
    assert predict.main(guessed) == 0
    row = predictions.read(tmp_path / "p.csv")[0]
    assert float(row["probability_1"]) == pytest.approx(likely["squash"].max().item(), rel=1e-4)


# Batch norms of views


@pytest.mark.usefixtures("small")
def test_each_view_is_normalised_by_itself_and_the_first_is_tested():
    trainer = begin(model={"kwargs": {"batch_norm": True}}, **VIEWS)
    layer = trainer.model.bn
    assert isinstance(layer, SplitBatchNorm2d)
    x = torch.randn(8, 8, 4, 4)
    x[4:] = 3 * x[4:] + 5
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    torch.testing.assert_close(layer.train()(x), torch.cat([first(x[:4]), second(x[4:])]))
    torch.testing.assert_close(layer.running_mean, first.running_mean)
    torch.testing.assert_close(layer.aux_bn[0].running_mean, second.running_mean)
    torch.testing.assert_close(layer.eval()(x), first.eval()(x))


@pytest.mark.usefixtures("small")
def test_a_run_with_split_norms_goes_on_and_its_weights_fit_the_plain_model(tree, tmp_path):
    options = {**VIEWS, "model": {"kwargs": {"batch_norm": True}}}
    options["augment"] = {"splits": 2, "auto_augment": "augmix-m5-w4-d2"}
    trainer = run(tree, 1, **options)
    path = save(tmp_path / "checkpoints" / "epoch_0001", trainer)
    again, _, _ = train.make_run(make(tree, **options), ["blue", "green", "red"], CPU)
    again.load_state(read(path), "test")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert not torch.equal(trainer.model.bn.running_mean, trainer.model.bn.aux_bn[0].running_mean)
    plain = models.load_trained(str(path), device=CPU).model
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(plain(images), trainer.model.eval()(images))


@pytest.mark.usefixtures("small")
def test_best_weights_are_without_the_norms_of_other_views(tree, tmp_path, recipe_file):
    recipe_file.write_text(json.dumps({
        "model": {"name": "small", "kwargs": {"batch_norm": True}}, "schedule": {"epochs": 1, "warmup_epochs": 0},
        "data": {"image_size": 32, "batch_size": 4, "workers": 0}, **VIEWS,
    }))  # fmt: skip
    output = tmp_path / "out"
    assert train.main([str(recipe_file), "--data", str(tree), "--output", str(output), "--device", "cpu"]) == 0
    assert not [name for name in read(output / "best.safetensors")["model"] if "aux_bn" in name]
    for file in (output / "best.safetensors", best_of(output)):
        assert validate.main(["--checkpoint", str(file), "--workers", "0"]) == 0


@pytest.mark.usefixtures("small")
def test_models_without_such_norms_are_refused():
    with pytest.raises(ValueError, match="model 'small' has no batch norms; set it to false"):
        begin(**VIEWS)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="model 'both' has BatchNorm1d, BatchNorm2d; set it to false"):
        models.split_batch_norms(model, 2, "both")


# The moving average


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("warmup", [False, True])
def test_the_averages_decay_grows_with_warmup(warmup):
    trainer = begin(train={"ema_decay": 0.9, "ema_warmup": warmup})
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    for step in range(1, 5):
        before = copy.deepcopy(trainer.ema.module.head.weight)
        F.cross_entropy(trainer.model(images), targets).backward()
        trainer._step()
        decay = min(0.9, 1 - step ** (-2 / 3)) if warmup else 0.9
        torch.testing.assert_close(trainer.ema.module.head.weight, before.lerp(trainer.model.head.weight, 1 - decay))
