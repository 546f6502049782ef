"""Image folders: labels, layouts that are refused, files that are left out, repeatable order and augmentation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionmix.tools import data, recipe, transforms
from visionmix.tools.evaluation import evaluate

CLASSES = ["blue", "green", "red"]
NORMALISE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def train_set(tree, seed=0):
    made = recipe.from_dict({"data": {"image_size": 16}, "augment": {"erase_prob": 0.5}}, "test")
    transform = data.train_transform(made, NORMALISE)
    return data.FolderSet(tree / "train", CLASSES, transform, seed=seed, replace=True)


def val_set(tree):
    transform = data.eval_transform(32, "bicubic", 1.0, NORMALISE)
    return data.FolderSet(tree / "val", CLASSES, transform, seed=0, replace=False)


def copy(tree, source, target):
    (tree / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tree / source, tree / target)


def test_check_folders_names_what_is_missing(tree, tmp_path):
    assert data.check_folders(tree) == CLASSES
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give --data"):
        data.check_folders(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no val/ folder \(it has blue"):
        data.split_folder(tree / "train", "val")
    (tree / "train" / "yellow").mkdir()
    with pytest.raises(ValueError, match=r"hold no images .*: yellow; fill or remove"):
        data.check_folders(tree)
    (tree / "train" / "yellow" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="yellow"):
        data.check_folders(tree)
    copy(tree, "train/red/0.jpg", "train/yellow/.hidden/0.jpg")
    with pytest.raises(ValueError, match="yellow"):
        data.check_folders(tree)
    copy(tree, "train/red/0.jpg", "train/yellow/0.jpg")
    with pytest.raises(ValueError, match=r"different classes; only in train/: yellow; give both"):
        data.check_folders(tree)


def test_a_class_of_val_that_train_lacks_is_refused(tree):
    copy(tree, "val/red/0.jpg", "val/white/0.jpg")
    with pytest.raises(ValueError, match=r"different classes; only in val/: white; give both"):
        data.check_folders(tree)
    with pytest.raises(ValueError, match=r"val has classes that the model does not know: white"):
        val_set(tree)


def test_a_split_without_class_folders_is_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match="train has no class folders; it must hold one folder of images"):
        data.check_folders(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_outside_class_folders_are_refused(tree, split):
    copy(tree, f"{split}/red/0.jpg", f"{split}/stray.JPG")
    for call in (data.check_folders, train_set if split == "train" else val_set):
        with pytest.raises(ValueError, match=rf"holds 1 image\(s\) outside .* as {split}/CLASS/stray.JPG"):
            call(tree)


def test_one_folder_around_the_classes_is_refused(tree):
    for split in ("train", "val"):
        (tree / split).rename(tree / "images")
        (tree / split).mkdir()
        (tree / "images").rename(tree / split / "images")
    with pytest.raises(ValueError, match=r"has only one class, 'images', .* directly in train/"):
        data.check_folders(tree)


def test_the_first_folder_below_the_split_is_the_class(tree):
    for split, name in (("val", "red/green/9.jpg"), ("train", "red/more/9.jpg"), ("train", "blue/a/b/red/9.jpg")):
        copy(tree, f"{split}/red/0.jpg", f"{split}/{name}")
    shutil.rmtree(tree / "train" / "green")
    copy(tree, "train/red/0.jpg", "train/green/only/below/0.jpg")
    assert data.check_folders(tree) == CLASSES
    sets = {"train": train_set(tree), "val": val_set(tree)}
    assert (len(sets["train"]), len(sets["val"])) == (6 + 1 + 1 + 7, 9 + 1)
    for split, each in sets.items():
        for path, target in each.samples:
            assert CLASSES[target] == Path(path).relative_to(tree / split).parts[0]


def test_hidden_folders_are_not_classes_and_hidden_files_not_images(tree, caplog):
    for name in (".thumbnails", "__MACOSX", ".ipynb_checkpoints"):
        copy(tree, "train/red/0.jpg", f"train/{name}/0.jpg")
        copy(tree, "train/red/0.jpg", f"train/red/{name}/0.jpg")
    copy(tree, "train/red/0.jpg", "train/._0.jpg")
    copy(tree, "train/red/0.jpg", "train/red/.DS_Store")
    assert data.check_folders(tree) == CLASSES
    assert len(train_set(tree)) == 18
    assert not caplog.records


def test_every_kind_of_image_is_read(tree, caplog):
    with Image.open(tree / "train" / "red" / "0.jpg") as image:
        for kind in ("webp", "tif", "TIFF", "bmp", "PNG", "gif", "jp2", "ppm"):
            image.save(tree / "train" / "red" / f"new.{kind}")
    images = train_set(tree)
    assert len(images) == 18 + 8
    for index, (path, _) in enumerate(images.samples):
        assert images.load(index)[0].size == (32, 32), path
    assert not caplog.records


def test_files_that_are_not_images_are_counted_once(tree, caplog):
    names = ("labels.csv", "red/notes.txt", "red/deep/a.pdf", "blue/1.npy")
    for name in names:
        (tree / "train" / name).parent.mkdir(exist_ok=True)
        (tree / "train" / name).touch()
    images = train_set(tree)
    assert len(images) == 18
    list(data.make_loader(images, batch=6, workers=0, shuffle=True))
    (record,) = caplog.records
    assert "left out 4 file(s)" in record.message
    assert all(name in record.message for name in names)


def test_outputs_take_the_place_of_the_order_of_classes(tree):
    transform = data.eval_transform(32, "bicubic", 1.0, NORMALISE)
    images = data.FolderSet(tree / "val", CLASSES, transform, seed=0, replace=False, outputs=[7, 2, 7])
    assert [target for _, target in images.samples] == [7] * 3 + [2] * 3 + [7] * 3


def test_validation_and_upper_case_names(tree):
    (tree / "val").rename(tree / "validation")
    for path in (tree / "train" / "red").iterdir():
        path.rename(path.with_suffix(".JPEG"))
    assert data.check_folders(tree) == CLASSES
    assert len(train_set(tree)) == 18


def test_images_of_16_bits_keep_their_brightness(tree):
    values = np.arange(32 * 32).reshape(32, 32).astype(np.uint16) * 64
    Image.fromarray(values).save(tree / "val" / "red" / "grey.png")
    images = val_set(tree)
    (index,) = [i for i, (path, _) in enumerate(images.samples) if path.endswith("grey.png")]
    sample = images[0, index]
    expected = np.rint(values / 257) / 255 * 2 - 1
    assert sample.image.numpy() == pytest.approx(np.stack([expected] * 3), abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_epoch_only(tree, workers):
    def epoch(number, workers, seed=0):
        loader = data.make_loader(train_set(tree, seed), batch=4, workers=workers, shuffle=True, seed=seed)
        loader.sampler.set_epoch(number)
        return torch.cat([batch.images for batch in loader])

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch(0, 0)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the training's generator
    torch.manual_seed(2)
    assert torch.equal(first, epoch(0, workers))
    assert not torch.equal(first, epoch(1, workers))
    assert not torch.equal(first, epoch(0, workers, seed=1))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_posterize_at_its_highest_level_is_black(policy):
    made = recipe.read("imagenet/defaults.yaml", {}, [f"augment.auto_augment={policy}"])
    transform = data.train_transform(made, NORMALISE)
    ops = [op for op in transforms._augmentations(transform) if op.name.startswith("Posterize")]
    assert ops
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    colours = set()
    for op in ops:
        op.prob = 1.0
        for level in range(11):
            op.magnitude, op.magnitude_std = level, 0
            colours.add(op(image).getpixel((0, 0)))
    assert {(0, 0, 0), (128, 0, 0), (192, 64, 0), (192, 96, 32)} <= colours


def test_epoch_sampler_shares_the_images_among_processes():
    def keys(rank, **kwargs):
        sampler = data.EpochSampler(23, batch=4, seed=0, rank=rank, world=2, **kwargs)
        sampler.set_epoch(5)
        assert len(list(sampler)) == len(sampler)
        return [key.index for key in sampler]

    both = keys(0, shuffle=True), keys(1, shuffle=True)
    assert [len(own) for own in both] == [8, 8]
    assert len(set(both[0] + both[1])) == 16
    assert sorted(keys(0, shuffle=False) + keys(1, shuffle=False)) == list(range(23))


def test_a_batch_larger_than_the_set_is_refused(tree):
    with pytest.raises(ValueError, match="has 18 images, fewer than one step"):
        data.make_loader(train_set(tree), batch=20, workers=0, shuffle=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_replaced_in_training(tree, cut, workers):
    broken = tree / "train" / "red" / "2.jpg"
    cut(broken)
    loader = data.make_loader(train_set(tree), batch=6, workers=workers, shuffle=True)
    batches = list(loader)
    assert sum(len(batch.targets) for batch in batches) == 18
    (line,) = [line for batch in batches for line in batch.unreadable]
    assert line.startswith(f"{broken}: image file is truncated")
    assert all(batch.images.isfinite().all() for batch in batches)
    again = torch.cat([batch.targets for batch in data.make_loader(train_set(tree), batch=6, workers=0, shuffle=True)])
    assert torch.equal(torch.cat([batch.targets for batch in batches]), again)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_a_damaged_image_is_replaced_in_training(tree, content):
    (tree / "train" / "red" / "2.jpg").write_bytes(content)
    batches = list(data.make_loader(train_set(tree), batch=6, workers=0, shuffle=True))
    assert sum(len(batch.targets) for batch in batches) == 18
    assert sum(len(batch.unreadable) for batch in batches) == 1


class ByColour(torch.nn.Module):
    """Predicts the brightest colour channel, the true class of every image in the tree."""

    def forward(self, images):
        return images.mean((2, 3)).flip(1)  # blue, green, red


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_test_image_does_not_count(tree, cut, workers):
    loader = data.make_loader(val_set(tree), batch=2, workers=workers, shuffle=False)
    whole = evaluate(ByColour(), loader, classes=3, device=torch.device("cpu"))
    assert (whole.count, whole.top1, whole.top5, whole.unreadable) == (9, 100.0, 100.0, [])
    assert torch.equal(whole.confusion, 3 * torch.eye(3, dtype=torch.int64))
    cut(tree / "val" / "red" / "0.jpg")
    cut(tree / "val" / "red" / "1.jpg")
    less = evaluate(ByColour(), loader, classes=3, device=torch.device("cpu"))
    assert (less.count, less.top1, len(less.unreadable)) == (7, 100.0, 2)
    assert less.confusion.diagonal().tolist() == [3, 3, 1]


def test_an_all_broken_set_is_refused(tree, cut):
    for path in (tree / "val").rglob("*.jpg"):
        cut(path)
    loader = data.make_loader(val_set(tree), batch=4, workers=0, shuffle=False)
    with pytest.raises(data.UnreadableData, match="not one test image"):
        evaluate(ByColour(), loader, classes=3, device=torch.device("cpu"))
