"""A tiny image folder and a tiny recipe, so that whole training runs take a second or two."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from visionmix.tools import pictures, train

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}

RECIPE = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {
            "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path_rate": 0.2, "proj_drop_rate": 0.1,
        },
    },
    "data": {"image_size": 32, "batch_size": 4, "workers": 0, "crop_pct": 1.0},
    # Everything that draws random numbers is on.
    "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5, "mixup": 0.8, "cutmix": 1.0},
    "optimizer": {"lr": 2e-3, "lr_batch": None, "clip_grad": 1.0},
    "schedule": {"epochs": 3, "warmup_epochs": 1},
    "train": {"ema_decay": 0.9, "ema_warmup": True, "seed": 3},
}  # fmt: skip


def make_tree(root: Path, train: int = 6, val: int = 3) -> Path:
    """Write noisy one-colour JPEGs of 32 pixels, `train` and `val` a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def truncate(path: Path) -> None:
    """Cut the file in half, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch):
    """Let a run end with empty pictures; `whole_run` draws them, which takes longer than a small training."""

    def write(*drawn):
        path = next(each for each in drawn if isinstance(each, Path))
        Image.new("RGB", (4, 4)).save(path, "PNG")

    for name in ("draw_curves", "draw_confusion", "draw_predictions"):
        monkeypatch.setattr(pictures, name, write)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images")


@pytest.fixture(scope="session")
def make_images():
    return make_tree


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run: its folder, which tests only read, and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    files = [str(write_recipe(root)), "--data", str(make_tree(root / "images")), "--output", str(root / "out")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train.main([*files, "--device", "cpu"]) == 0
    return root / "out", printed.getvalue()


@pytest.fixture
def finished(whole_run, tmp_path) -> Path:
    """A copy of the uninterrupted run, for tests that write into it."""
    return shutil.copytree(whole_run[0], tmp_path / "whole")


@pytest.fixture
def cut():
    return truncate


@pytest.fixture
def small(monkeypatch):
    """Let the model "small" be `Small`; others are made as always."""
    # Imported here, because most tests of this folder train nothing.
    from small_runs import Small

    from visionmix.tools import models

    create = models.create_model

    def create_model(name, **options):
        if name != "small":
            return create(name, **options)
        for name in ("pretrained", "reduction"):
            options.pop(name, None)
        return Small(**options)

    monkeypatch.setattr(models, "create_model", create_model)
