"""From a decoded image to the model's input: timm's transforms, of a recipe for training and of a model for testing."""

import itertools
from collections.abc import Iterator

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize

from visionmix.tools.recipe_keys import Recipe


def train_transform(recipe: Recipe, normalise: dict):
    """Return timm's training transform of the recipe, or one by each of its sizes.

    Args:
        recipe: of the run.
        normalise: the model's mean and std.
    """
    if recipe.data.sizes is None:
        return _train_transform(recipe, normalise, recipe.data.image_size)
    return {size: _train_transform(recipe, normalise, size) for _, *sizes in recipe.data.sizes for size in sizes}


def _train_transform(recipe: Recipe, normalise: dict, size: int):
    augment = recipe.augment
    transform = create_transform(
        size,
        is_training=True,
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=recipe.data.interpolation,
        re_prob=augment.erase_prob,
        re_mode=augment.erase_mode,
        separate=augment.splits > 1,
        **normalise,
    )
    if augment.splits > 1:
        transform = Views(*transform, augment.splits)
    for op in _augmentations(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return transform


class Views:
    """Several views of an image, of one crop: the first as it is, the others augmented, as `timm.data.AugMixDataset`.

    Args:
        crop: from the image to the part that all views show.
        augment: between images.
        finish: from an image to a normalised tensor.
        count: views of an image.
    """

    def __init__(self, crop, augment, finish, count: int) -> None:
        self.crop, self.augment, self.finish, self.count = crop, augment, finish, count

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the views, float32 (views, channels, height, width)."""
        image = self.crop(image)
        views = [image, *(self.augment(image) for _ in range(self.count - 1))]
        return torch.stack([self.finish(view) for view in views])

    @property
    def transforms(self) -> list:
        """The parts of all three."""
        return [*self.crop.transforms, *self.augment.transforms, *self.finish.transforms]


def _augmentations(transform) -> Iterator[AugmentOp]:
    for part in transform.transforms:
        yield from getattr(part, "ops", ())  # of RandAugment and AugMix
        yield from itertools.chain(*getattr(part, "policy", ()))  # of AutoAugment


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """Call timm's op, except at its highest level: 0 bits, which Pillow 13 refuses, make the image black as before."""
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def eval_transform(image_size: int, interpolation: str, crop_pct: float, normalise: dict):
    """Return timm's test transform: resize, centre crop, normalise."""
    interpolation = "bicubic" if interpolation == "random" else interpolation
    return create_transform(image_size, interpolation=interpolation, crop_pct=crop_pct, **normalise)
