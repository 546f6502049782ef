"""Training images as 8-bit integers: what the device makes of them is what timm's own transform gives."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import make
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from visionmix.tools import data, recipe, train, transforms
from visionmix.tools.images import read_rgb
from visionmix.tools.loading import Batch, Sample, collate, with_boxes

CPU = torch.device("cpu")
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLASSES = ["blue", "green", "red"]


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(found):
    return collate([Sample(*with_boxes(found)[:1], 0, [], with_boxes(found)[1])])


def made(**augment):
    return recipe.from_dict({"data": {"image_size": 32}, "augment": augment}, "test")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize(
    "augment",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "vflip": 0.5},
        {"color_jitter": 0.7, "hflip": 0.2, "vflip": 0.3, "scale": [0.3, 0.6], "ratio": [0.5, 0.9]},
        {"auto_augment": "3a", "color_jitter": 0.2},
    ],
)
def test_the_finished_images_are_those_of_timm(image, augment, interpolation):
    settings = {"data": {"image_size": 32, "interpolation": interpolation}, "augment": augment}
    ours = transforms.train_transform(recipe.from_dict(settings, "test"), NORMALISE)
    options = {"color_jitter": 0.4} | augment
    theirs = create_transform(32, is_training=True, interpolation=interpolation, **options, **NORMALISE)
    transforms.repair_posterize(theirs)
    finish = transforms.Finish(NORMALISE, "const", CPU)
    for seed in range(8):
        with data.Repeatable(seed):
            found = ours(image)
        assert found.dtype == torch.uint8
        with data.Repeatable(seed):
            expected = theirs(image)
        assert torch.equal(finish(batch_of(found))[0], expected)


def test_erased_boxes_lie_where_timm_erases():
    pixels = torch.full((3, 40, 30), 200, dtype=torch.uint8)
    finish = transforms.Finish(NORMALISE, "const", CPU)
    erased = 0
    for seed in range(30):
        random.seed(seed)
        _, boxes = transforms._Erase(0.7)(pixels)
        random.seed(seed)
        expected = RandomErasing(0.7, mode="const", device="cpu")(torch.ones(3, 40, 30))
        images = finish(Batch(pixels[None], torch.tensor([0]), [], 0, boxes))
        assert torch.equal(images[0] == 0, expected == 0)
        erased += len(boxes)
    assert 10 < erased < 30


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_what_fills_a_box(mode):
    boxes = torch.tensor([[0, 10, 20, 30, 40, 7], [1, 0, 0, 64, 32, 8], [1, 5, 40, 3, 3, 7]])
    batch = Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 0]), [], 0, boxes)
    plain = transforms.Finish(NORMALISE, mode, CPU)(Batch(batch.images, batch.targets, [], 0))
    images = transforms.Finish(NORMALISE, mode, CPU)(batch)
    assert torch.equal(images, transforms.Finish(NORMALISE, mode, CPU)(batch))  # to the bit, again
    changed = torch.zeros(2, 64, 64, dtype=torch.bool)
    changed[0, 10:40, 20:60] = changed[1, :, :32] = changed[1, 5:8, 40:43] = True
    assert torch.equal((images != plain).any(1), changed)
    box, other = images[0, :, 10:40, 20:60], images[1, :, :, :32]
    if mode == "const":
        assert (box == 0).all()
    elif mode == "rand":
        assert (box == box[:, :1, :1]).all()
        assert len({*box[:, 0, 0].tolist(), *other[:, 0, 0].tolist()}) == 6
    else:
        assert len(box.unique()) > 3000
        assert abs(box.mean()) < 0.1
        assert abs(box.std() - 1) < 0.1


def test_floats_are_only_copied():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(transforms.Finish(NORMALISE, "const", CPU)(Batch(images, torch.tensor([0, 1]), [], 0)), images)


@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_follow_their_images_through_a_loader(tree, workers):
    """Every image of the tree is one view of one crop; views of an image have boxes of their own."""
    sections = {"augment": {"erase_prob": 1.0, "splits": 3, "auto_augment": "augmix-m3"}, "train": {"loss": "jsd"}}
    transform = data.train_transform(recipe.from_dict({**sections, "data": {"image_size": 16}}, "test"), NORMALISE)
    images = data.FolderSet(tree / "train", CLASSES, transform, seed=0, replace=True)
    loader = data.make_loader(images, batch=6, workers=workers, shuffle=True)
    keys = list(loader.sampler)
    for number, batch in enumerate(loader):
        own = [images[key] for key in keys[6 * number : 6 * number + 6]]
        expected = sorted((view * 6 + place, *rest) for place, sample in enumerate(own)
                          for view, *rest in sample.boxes.tolist())  # fmt: skip
        assert sorted(map(tuple, batch.boxes.tolist())) == expected
        assert {row[0] for row in expected} == set(range(18))
        assert len({row[-1] for row in expected}) == 18  # seeds


def test_an_rgb_file_is_not_copied_and_others_are_converted(tree, image, tmp_path):
    image.convert("L").save(tmp_path / "grey.jpg")
    with Image.open(tree / "train" / "red" / "0.jpg") as opened:
        assert np.array_equal(np.asarray(read_rgb(tree / "train" / "red" / "0.jpg")), np.asarray(opened))
    assert read_rgb(tmp_path / "grey.jpg").mode == "RGB"


def test_the_recipes_mean_std_and_interpolation_reach_the_images_of_both_sets(small, tree):
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9], "interpolation": "bilinear", "image_size": 24}
    trainer, loader, tests = train.make_run(make(tree, data=options), CLASSES, CPU)
    mean, std = torch.tensor(options["mean"]).view(3, 1, 1), torch.tensor(options["std"]).view(3, 1, 1)
    for name, batch in (("train", next(iter(loader))), ("val", next(iter(tests)))):
        pixels = []
        for target, colour in enumerate(CLASSES):
            for path in sorted((tree / name / colour).iterdir()):
                resized = read_rgb(path).resize((24, 24), Image.Resampling.BILINEAR)
                pixels.append((target, torch.tensor(np.asarray(resized)).movedim(-1, 0) / 255))
        for image, target in zip(trainer.finish_batch(batch), batch.targets.tolist(), strict=True):
            wanted = [(plain - mean) / std for own, plain in pixels if own == target]
            assert min((image - each).abs().max() for each in wanted) < 1e-5


def test_training_erases_by_the_recipe(small, tree):
    seen = []
    for mode in ("const", "rand"):
        sections = {"model": {"name": "small"}, "data": {"image_size": 32, "batch_size": 18, "workers": 0,
                    "path": str(tree)}, "augment": {"erase_prob": 1.0, "erase_mode": mode}}  # fmt: skip
        trainer, loader, _ = train.make_run(recipe.from_dict(sections, "test"), CLASSES, CPU)
        images = trainer.finish_batch(next(iter(loader)))
        zero = (images == 0).all(1).flatten(1).sum(1)
        seen.append(int((zero > 10).sum()))
    assert seen == [18, 0]
