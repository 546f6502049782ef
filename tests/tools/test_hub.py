"""Hugging Face data sets: made here and saved to disk, or loaded by name from a folder of images."""

import io
import sys

import pytest
import torch
from PIL import Image

from visionmix.tools import data, hub, train
from visionmix.tools.recipe_keys import DataRecipe

datasets = pytest.importorskip("datasets")

CLASSES = ["blue", "green", "red"]
STILL = data.eval_transform(32, "bicubic", 1.0, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(tree, split, labels=None):
    files = sorted((tree / split).rglob("*.jpg"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return {"image": images, "label": labels or [CLASSES.index(file.parent.name) for file in files]}


def saved(tree, path, label=None, names=("train", "validation"), **columns):
    features = datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(names=CLASSES)})
    sets = {
        name: datasets.Dataset.from_dict(rows(tree, split, **columns), features=features)
        for name, split in zip(names, ("train", "val"), strict=True)
    }
    datasets.DatasetDict(sets).save_to_disk(path)
    return path


def split_of(path, split="train", classes=CLASSES, count=None, inside=None, **options):
    wanted = DataRecipe(path=str(path), classes=count, **{split: inside})
    return data.open_split(wanted, split, classes, STILL, **options)


def loaded(images):
    return sorted((image.tobytes(), target) for image, target in map(images.load, range(len(images))))


def test_a_saved_set_has_the_images_and_classes_of_the_folder(tree, tmp_path):
    path = saved(tree, tmp_path / "saved")
    assert data.check_data(DataRecipe(path=str(path))) == CLASSES
    for split in ("train", "val"):
        assert loaded(split_of(path, split)) == loaded(split_of(tree, split))
    assert {number for (number,) in split_of(path, outputs=[7, 2, 7]).targets} == {2, 7}
    assert len(split_of(path, "train", inside="validation")) == 9
    with pytest.raises(FileNotFoundError, match=r"no split other \(it has train, validation\); name it in data.val"):
        split_of(path, "val", inside="other")


def test_a_set_by_name(tree, tmp_path):
    """An image folder loads by its path as a data set on the hub does by its name."""
    path = f"hf:{tree}"
    assert data.check_data(DataRecipe(path=path)) == CLASSES
    assert loaded(split_of(path, "val")) == loaded(split_of(tree, "val"))
    assert len(split_of(path, "train", inside="train[:50%]")) == 9
    assert data.absolute(path) == path


def test_labels_without_names_need_a_count(tree, tmp_path):
    path = saved(tree, tmp_path / "saved", datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"plain integers; give the number of classes in data.classes"):
        data.check_data(DataRecipe(path=str(path)))
    names = data.check_data(DataRecipe(path=str(path), classes=3))
    assert names == ["0", "1", "2"]
    assert sorted(split_of(path, classes=names, count=3).targets) == [[0]] * 6 + [[1]] * 6 + [[2]] * 6
    with pytest.raises(ValueError, match=r"have no class, e.g. number 12 with label 2"):
        split_of(path, classes=["0", "1"], count=2)
    with pytest.raises(ValueError, match=r"data.classes=4, but the labels have 3 names; leave it out"):
        split_of(saved(tree, tmp_path / "named"), count=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_it_and_damaged_images_are_passed_over(tree, cut, tmp_path, workers):
    cut(tree / "train" / "red" / "2.jpg")
    images = split_of(saved(tree, tmp_path / "saved"))
    batches = []
    for rank in range(2):
        loader = data.make_loader(images, batch=3, workers=workers, shuffle=True, rank=rank, world=2)
        batches += list(loader)
    pictures = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert len(pictures) == 17
    (line,) = [line for batch in batches for line in batch.unreadable]
    assert line.startswith("data set[14] (2.jpg): ")


def test_a_pass_goes_on_in_mid_epoch(tree, tmp_path):
    images = split_of(saved(tree, tmp_path / "saved"))
    whole = [batch.images for batch in data.make_loader(images, batch=3, workers=0, shuffle=True)]
    loader = data.make_loader(images, batch=3, workers=0, shuffle=True)
    loader.load_state_dict({"epoch": 0, "images": 12})
    assert all(torch.equal(batch.images, other) for batch, other in zip(loader, whole[4:], strict=True))


def test_sets_without_images_or_splits_are_refused(tree, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=CLASSES)})
    texts = datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
    datasets.DatasetDict({"train": texts, "val": texts}).save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"columns text, label, with 0 of images and 1 of labels"):
        data.check_data(DataRecipe(path=str(tmp_path / "texts")))
    texts.save_to_disk(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"one has no splits; save a DatasetDict"):
        data.check_data(DataRecipe(path=str(tmp_path / "one")))
    with pytest.raises(FileNotFoundError, match="cannot be loaded as a Hugging Face data set"):
        data.check_data(DataRecipe(path=f"hf:{tmp_path}/nowhere"))


def test_an_empty_image_and_one_of_16_bits(tree, tmp_path):
    wide = io.BytesIO()
    Image.new("I;16", (4, 4), 128 * 257).save(wide, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    content = {"image": [None, {"bytes": wide.getvalue(), "path": None}], "label": [0, 1]}
    one = datasets.Dataset.from_dict(content, features=features)
    images = hub.HubSet(one, CLASSES, STILL, seed=0, replace=False)
    with pytest.raises(data.UnreadableImage, match=r"data set\[0\]: is empty"):
        images.load(0)
    assert images.load(1)[0].getpixel((0, 0)) == (128, 128, 128)


def test_the_library_missing_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'visionmix\[hub\]'"):
        data.check_data(DataRecipe(path="hf:anything"))


@pytest.mark.long
def test_a_training_run(tree, recipe_file, tmp_path, capsys):
    path = saved(tree, tmp_path / "saved")
    arguments = [str(recipe_file), "--data", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert train.main([*arguments, "--epochs", "2"]) == 0, capsys.readouterr().err
    assert "18 train and 9 test images" in capsys.readouterr().out
