"""Image folders: what is refused, what is passed over, and that order and augmentation repeat."""

import shutil

import pytest
import torch
from PIL import Image

from visionmix.tools import data, recipe
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


def test_what_is_missing_is_named(tree, tmp_path):
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
    shutil.copy(tree / "train" / "red" / "0.jpg", tree / "train" / "yellow")
    with pytest.raises(ValueError, match=r"different classes; only in train/: yellow"):
        data.check_folders(tree)


def test_a_folder_without_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        data.check_folders(tmp_path)


def test_hidden_folders_are_no_classes(tree):
    (tree / "train" / ".thumbnails").mkdir()
    assert data.check_folders(tree) == CLASSES


def test_validation_and_upper_case_names(tree):
    (tree / "val").rename(tree / "validation")
    for path in (tree / "train" / "red").iterdir():
        path.rename(path.with_suffix(".JPEG"))
    assert data.check_folders(tree) == CLASSES
    assert len(train_set(tree)) == 18


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
def test_posterizing_goes_as_far_as_black(policy):
    made = recipe.read("imagenet/defaults.yaml", {}, [f"augment.auto_augment={policy}"])
    transform = data.train_transform(made, NORMALISE)
    ops = [op for op in data._augmentations(transform) if op.name.startswith("Posterize")]
    assert ops
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    colours = set()
    for op in ops:
        op.prob = 1.0
        for level in range(11):
            op.magnitude, op.magnitude_std = level, 0
            colours.add(op(image).getpixel((0, 0)))
    assert {(0, 0, 0), (128, 0, 0), (192, 64, 0), (192, 96, 32)} <= colours


def test_processes_share_the_images():
    def keys(rank, **kwargs):
        sampler = data.EpochSampler(23, batch=4, seed=0, rank=rank, world=2, **kwargs)
        sampler.set_epoch(5)
        assert len(list(sampler)) == len(sampler)
        return [index for _, index in sampler]

    both = keys(0, shuffle=True), keys(1, shuffle=True)
    assert [len(own) for own in both] == [8, 8]
    assert len(set(both[0] + both[1])) == 16
    assert sorted(keys(0, shuffle=False) + keys(1, shuffle=False)) == list(range(23))


def test_a_batch_larger_than_the_set(tree):
    with pytest.raises(ValueError, match="has 18 images, fewer than one step"):
        data.make_loader(train_set(tree), batch=20, workers=0, shuffle=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_replaced_in_training(tree, cut, workers):
    broken = tree / "train" / "red" / "2.jpg"
    cut(broken)
    loader = data.make_loader(train_set(tree), batch=6, workers=workers, shuffle=True)
    batches = list(loader)
    assert sum(len(batch.targets) for batch in batches) == 18
    assert [path for batch in batches for path in batch.unreadable] == [str(broken)]
    assert all(batch.images.isfinite().all() for batch in batches)
    again = torch.cat([batch.targets for batch in data.make_loader(train_set(tree), batch=6, workers=0, shuffle=True)])
    assert torch.equal(torch.cat([batch.targets for batch in batches]), again)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_other_damage(tree, content):
    (tree / "train" / "red" / "2.jpg").write_bytes(content)
    batches = list(data.make_loader(train_set(tree), batch=6, workers=0, shuffle=True))
    assert sum(len(batch.targets) for batch in batches) == 18
    assert sum(len(batch.unreadable) for batch in batches) == 1


class ByColour(torch.nn.Module):
    """Names the colour channel that is brightest: right for every image of the tree."""

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
