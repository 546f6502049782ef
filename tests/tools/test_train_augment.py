"""Repeated augmentation, views of an image, 3-Augment, and the loss that compares views."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CPU, begin, make
from timm.data.distributed_sampler import RepeatAugSampler
from torch.nn import functional as F

from visionmix.tools import data, recipe, train
from visionmix.tools.losses import criterion

CLASSES = ["blue", "green", "red"]
NORMALISE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def sampler(**options):
    made = data.EpochSampler(50, batch=5, seed=3, shuffle=True, **options)
    made.set_epoch(2)
    return made


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_repeats_are_dealt_out_as_timm_does(world, repeats):
    order = [key.index for key in data.EpochSampler(50, batch=1, seed=3, shuffle=True)]
    for rank in range(world):
        mine = data.EpochSampler(50, batch=5, seed=3, shuffle=True, rank=rank, world=world, repeats=repeats)
        published = RepeatAugSampler(order, world, rank, False, repeats, selected_round=0)
        assert len(list(mine)) == len(mine) == 50 // (5 * world) * 5
        assert [key.index for key in mine] == [order[place] for place in published][: len(mine)]


def test_the_copies_of_an_image_are_told_apart_and_go_to_other_processes():
    keys = [list(sampler(rank=rank, world=3, repeats=3)) for rank in range(3)]
    assert len({key for mine in keys for key in mine}) == 3 * 15
    for mine in zip(*keys, strict=True):
        assert len({key.index for key in mine}) == 1
        assert sorted(key.copy for key in mine) == [0, 1, 2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_run_repeats_images_as_the_recipe_says(tree, repeats):
    _, loader, _ = train.make_run(make(tree, augment={"repeats": repeats}), CLASSES, CPU)
    keys = list(loader.sampler)
    assert len(keys) == 16  # of 18 images, in batches of 4
    assert [keys.count(key) for key in keys] == [1] * 16
    assert len({key.index for key in keys}) == -(-16 // repeats)


def images(tree, **augment):
    made = recipe.from_dict({"data": {"image_size": 16}, "train": augment.pop("train", {}), "augment": augment}, "test")
    return data.FolderSet(tree / "train", CLASSES, data.train_transform(made, NORMALISE), seed=0, replace=True)


def test_each_copy_is_augmented_anew_and_the_first_as_without_repeats(tree):
    found = images(tree)
    views = [found[data.Key(1, 4, copy)].image for copy in range(3)]
    assert torch.equal(views[0], found[1, 4].image)
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])
    assert torch.equal(views[2], found[1, 4, 2].image)


JSD = {"splits": 3, "auto_augment": "augmix-m9-w3", "train": {"loss": "jsd"}}


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_a_batch_come_one_view_after_another(tree, workers):
    found = images(tree, **JSD)
    loader = data.make_loader(found, batch=6, workers=workers, shuffle=True)
    batch = next(iter(loader))
    assert batch.images.shape == (18, 3, 16, 16)
    assert batch.targets.shape == (6,)
    plain = images(tree)  # the same crops, without augmentation but jitter
    plain.transform.transforms[:] = [
        part for part in plain.transform.transforms if type(part).__name__ != "ColorJitter"
    ]
    keys = list(loader.sampler)[:6]
    assert torch.equal(batch.images[:6], torch.stack([plain[key].image for key in keys]))
    for first, second in ((0, 6), (6, 12), (0, 12)):
        assert not torch.equal(batch.images[first : first + 6], batch.images[second : second + 6])
    for number, key in enumerate(keys):
        assert torch.equal(batch.images[number::6], found[key].image)


def test_the_divergence_of_views_is_added_to_the_loss_of_the_first():
    made = recipe.from_dict(
        {"augment": {"splits": 3}, "train": {"loss": "jsd", "label_smoothing": 0.0}, "data": {"batch_size": 4}}, "test"
    )
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3])
    p = logits.view(3, 4, 5).softmax(-1)
    mean = p.mean(0)
    divergence = (p * (p.log() - mean.log())).sum(-1).mean()
    wanted = F.cross_entropy(logits[:4], targets) + 12 * divergence
    torch.testing.assert_close(criterion(made)(logits, targets), wanted)
    alike = logits[:4].repeat(3, 1)
    torch.testing.assert_close(criterion(made)(alike, targets), F.cross_entropy(logits[:4], targets))


def test_three_augment_is_solarised_grey_or_blurred_and_then_jittered():
    made = recipe.from_dict(
        {
            "data": {"image_size": 16},
            "augment": {"auto_augment": "3a", "color_jitter": 0.3, "scale": [1, 1], "ratio": [1, 1], "hflip": 0.0},
        },
        "test",
    )
    transform = data.train_transform(made, NORMALISE)
    assert [type(part).__name__ for part in transform.transforms][1:3] == ["AutoAugment", "ColorJitter"]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    policy, seen = transform.transforms[1], set()
    for seed in range(20):
        with data.Repeatable(seed):
            result = np.asarray(policy(Image.fromarray(pixels))).astype(int)
        if np.array_equal(result, np.where(pixels < 128, pixels, 255 - pixels)):
            seen.add("solarised")
        elif (np.ptp(result, axis=2) == 0).all():
            seen.add("grey")
        elif result.std() < pixels.std():
            seen.add("blurred")
    assert seen == {"solarised", "grey", "blurred"}


# Mixup and CutMix


def mixed(count: int, **augment) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (images, targets) that reach the model and the loss, of batches of one-coloured images 0, 1, 4, 9, ..."""
    trainer = begin(train={"label_smoothing": 0.0}, augment=augment)
    images, targets = [], []
    trainer.model.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0].clone()))
    trainer.criterion.register_forward_pre_hook(lambda module, inputs: targets.append(inputs[1].clone()))
    for seed in range(count):
        given = torch.arange(6.0).square().view(6, 1, 1, 1).expand(6, 3, 32, 32).clone()
        with data.Repeatable(seed):
            trainer._update(data.Batch(given, torch.tensor([0, 0, 0, 1, 1, 1]), [], 0))
    return list(zip(images, targets, strict=True))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("mode", "strengths"), [("batch", 1), ("pair", 3), ("elem", 6)])
def test_mix_mode_draws_a_strength_for_each_batch_pair_or_image(mode, strengths):
    for images, targets in mixed(5, mixup=1.0, mix_mode=mode):
        plain = torch.arange(6.0).square()
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
        kept = (images[:, 0, 0, 0] - plain.flip(0)) / (plain - plain.flip(0))  # of each image, the rest of its partner
        assert ((kept >= -1e-6) & (kept <= 1 + 1e-6)).all()
        # Within a batch a partner keeps as much; "elem" alone draws for each image by itself.
        assert len({round(value, 4) for value in kept.tolist()}) == strengths
        if mode != "elem":
            torch.testing.assert_close(kept, kept.flip(0))
        torch.testing.assert_close(targets[:, 0], torch.where(plain < 9, kept, 1 - kept))


@pytest.mark.usefixtures("small")
def test_mix_prob_is_the_share_of_batches_that_are_mixed():
    plain = torch.arange(6.0).square().view(6, 1, 1, 1)
    for prob, least, greatest in ((0.0, 0, 0), (0.3, 6, 18), (1.0, 40, 40)):
        changed = sum(bool((images != plain).any()) for images, _ in mixed(40, mixup=1.0, mix_prob=prob))
        assert least <= changed <= greatest, prob


@pytest.mark.usefixtures("small")
def test_mix_switch_prob_is_the_share_of_cutmix():
    for prob, least, greatest in ((0.0, 0, 0), (0.3, 6, 18), (1.0, 33, 40)):  # a few boxes are empty or whole
        cut = sum(
            bool((images[0] != images[0, 0, 0, 0]).any())
            for images, _ in mixed(40, mixup=1.0, cutmix=1.0, mix_switch_prob=prob)
        )
        assert least <= cut <= greatest, prob


@pytest.mark.usefixtures("small")
def test_a_cut_box_counts_by_its_area():
    boxes = 0
    for images, targets in mixed(10, cutmix=1.0):
        plain = torch.arange(6.0).square()
        kept = (images == plain.view(6, 1, 1, 1)).float().mean((1, 2, 3))
        assert torch.equal(kept, kept[:1].expand(6))
        assert ((images == plain.view(6, 1, 1, 1)) | (images == plain.flip(0).view(6, 1, 1, 1))).all()
        torch.testing.assert_close(targets[:, 0], torch.where(plain < 9, kept, 1 - kept))
        boxes += 0 < kept[0] < 1
    assert boxes > 5


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"augment": {"repeats": 0}}, "augment.repeats=0 is out of range"),
        ({"augment": {"splits": 3}}, "train.loss='cross_entropy' and augment.splits=3 do not fit"),
        ({"augment": {"crop_padding": 4}}, "augment.crop_padding=4 belongs to augment.crop_mode=simple, not to rrc"),
        (
            {"augment": {"crop_mode": "simple"}, "data": {"interpolation": "random"}},
            "does not go with augment.crop_mod",
        ),
        ({"train": {"split_bn": True}}, "train.split_bn=True needs views to tell apart; set augment.splits"),
        ({"train": {"split_bn": True, "sync_bn": True, "loss": "jsd"}, "augment": {"splits": 2}}, "train.sync_bn"),
        ({"augment": {"hflip": 1.5}}, "augment.hflip=1.5 is out of range; it must be between 0 and 1"),
        ({"augment": {"vflip": -0.5}}, "augment.vflip=-0.5 is out of range"),
        ({"augment": {"color_jitter": -1.0}}, "augment.color_jitter=-1.0 is out of range"),
        ({"augment": {"mix_prob": 1.5}}, "augment.mix_prob=1.5 is out of range"),
        ({"augment": {"mix_switch_prob": -0.5}}, "augment.mix_switch_prob=-0.5 is out of range"),
        ({"augment": {"scale": [0.5]}}, r"augment.scale=\[0.5\] must be \[least, greatest\]"),
        ({"augment": {"scale": [1.0, 0.5]}}, r"augment.scale=\[1.0, 0.5\] .* the smaller first"),
        ({"augment": {"scale": [0.5, 2.0]}}, r"augment.scale=\[0.5, 2.0\] asks for crops larger than their image"),
        ({"augment": {"ratio": [0.0, 1.0]}}, r"augment.ratio=\[0.0, 1.0\] .* above 0"),
        ({"augment": {"splits": 1}}, "augment.splits=1 do not fit"),
        ({"data": {"mean": [123.0, 116.0, 103.0]}}, "of pixels from 0 to 1"),
        ({"data": {"mean": [0.5]}}, r"data.mean=\[0.5\] must be three numbers, finite"),
        ({"data": {"std": [0.0, 0.5, 0.5]}}, r"data.std=\[0.0, 0.5, 0.5\] must be three numbers, above 0"),
        ({"train": {"loss": "jsd"}}, "train.loss='jsd' and augment.splits=0 do not fit"),
        ({"train": {"loss": "jsd"}, "augment": {"splits": 1}}, "augment.splits=1 do not fit"),
        ({"train": {"loss": "jsd"}, "augment": {"splits": 3, "mixup": 1.0}}, "augment.splits=3 does not go with mixup"),
    ],
)
def test_mistakes_are_named(sections, words):
    with pytest.raises(ValueError, match=words):
        recipe.from_dict(sections, "test")


@pytest.mark.parametrize("policy", ["nonsense", "rand-k9", "augmix-q3"])
def test_a_policy_that_timm_does_not_know_is_refused(policy):
    made = recipe.from_dict({"augment": {"auto_augment": policy}}, "test")
    with pytest.raises(ValueError, match=f"augment.auto_augment='{policy}' is no policy of timm"):
        data.train_transform(made, NORMALISE)
