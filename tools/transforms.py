"""From a decoded image to the model's input: timm's transforms, of a recipe for training and of a model for testing.

Training images stay 8-bit integers until they are on the model's device: a quarter of the bytes to copy, and the
processes that load have less to do.
"""

import itertools
from collections.abc import Iterator

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomCrop

from visionmix.tools.loading import BOX, Batch, with_boxes
from visionmix.tools.recipe_keys import Recipe


def train_transform(recipe: Recipe, normalise: dict):
    """Return the recipe's training transform, to 8-bit integers that `Finish` completes, or one by each of its sizes.

    Args:
        recipe: of the run.
        normalise: the model's mean and std; augmentations fill with the mean.

    Raises:
        ValueError: timm cannot read the recipe's policy of augmentation.
    """
    if recipe.data.sizes is None:
        return _train_transform(recipe, normalise, recipe.data.image_size)
    return {size: _train_transform(recipe, normalise, size) for _, *sizes in recipe.data.sizes for size in sizes}


def _train_transform(recipe: Recipe, normalise: dict, size: int):
    augment = recipe.augment
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
            train_crop_mode=None if augment.crop_mode == "simple" else augment.crop_mode,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            interpolation=recipe.data.interpolation,
            normalize=False,  # which ends the transform with 8-bit integers
            separate=augment.splits > 1,
            **normalise,
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's words for a policy that it cannot read
        raise ValueError(
            f"augment.auto_augment={augment.auto_augment!r} is no policy of timm ({error}); give one such as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, 3a, original or v0, or null for none"
        ) from error
    if augment.crop_mode == "simple":  # in place of the crop that timm puts first, as the published codes have it
        first = transform[0] if augment.splits > 1 else transform
        resize = eval_transform(size, recipe.data.interpolation, recipe.data.crop_pct, normalise).transforms[0]
        window = RandomCrop(size, padding=augment.crop_padding or None, padding_mode="reflect")
        first.transforms[:1] = [resize, window]
    finishing = transform[2] if augment.splits > 1 else transform
    if augment.erase_prob:
        finishing.transforms.append(_Erase(augment.erase_prob))
    if augment.splits > 1:
        transform = Views(*transform, augment.splits)
    repair_posterize(transform)
    return transform


def repair_posterize(transform) -> None:
    """Let timm's posterisation at its highest level, 0 bits, make images black; Pillow 13 refuses it."""
    for op in _augmentations(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


class _Erase:
    """timm's random erasing, of which it draws the boxes and leaves the filling to `Finish`."""

    def __init__(self, probability: float) -> None:
        self.draw = RandomErasing(probability, mode="const", device="cpu")

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        canvas = _Canvas(pixels)
        self.draw(canvas)
        return pixels, torch.tensor(canvas.boxes, dtype=torch.int64).reshape(-1, BOX)


class _Canvas:
    """An image for `RandomErasing` that notes which boxes are filled, each with a seed of its own."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.size, self.dtype, self.boxes = pixels.size, pixels.dtype, []

    def __setitem__(self, place: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = place
        seed = int(torch.randint(2**62, ()))
        self.boxes.append((0, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start, seed))


class Views:
    """Several views of an image, of one crop: the first as it is, the others augmented, as `timm.data.AugMixDataset`.

    Args:
        crop: from the image to the part that all views show.
        augment: between images.
        finish: from an image to a tensor, or a tensor and its boxes.
        count: views of an image.
    """

    def __init__(self, crop, augment, finish, count: int) -> None:
        self.crop, self.augment, self.finish, self.count = crop, augment, finish, count

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the views, (views, channels, height, width), and the boxes of all."""
        image = self.crop(image)
        views = [image, *(self.augment(image) for _ in range(self.count - 1))]
        pixels, boxes = zip(*(with_boxes(self.finish(view)) for view in views), strict=True)
        for view, own in enumerate(boxes):
            own[:, 0] = view
        return torch.stack(pixels), torch.cat(boxes)

    @property
    def transforms(self) -> list:
        """The parts of all three."""
        return [*self.crop.transforms, *self.augment.transforms, *self.finish.transforms]


class Finish:
    """From a loader's batch to the model's input on its device: copied, normalised, and its boxes erased.

    Args:
        normalise: the model's mean and std.
        erase_mode: what fills a box: "const", "rand" (one colour) or "pixel" (noise).
        device: of the model.
    """

    def __init__(self, normalise: dict, erase_mode: str, device: torch.device) -> None:
        self.erase_mode, self.device = erase_mode, device
        self.mean, self.std = (
            torch.tensor(normalise[name], dtype=torch.float32, device=device).view(-1, 1, 1) for name in ("mean", "std")
        )

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return float32 (views * batch, channels, height, width); images that are floats already are only copied."""
        images = batch.images.to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            return images
        images = (
            images.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(self.mean).div_(self.std)
        )
        generator = torch.Generator(self.device)
        for number, top, left, height, width, seed in batch.boxes.tolist():
            box = images[number, :, top : top + height, left : left + width]
            if self.erase_mode == "const":
                box.zero_()
                continue
            generator.manual_seed(seed)
            shape = box.shape if self.erase_mode == "pixel" else (len(box), 1, 1)
            box.copy_(torch.randn(shape, generator=generator, device=self.device))
        return images


def _augmentations(transform) -> Iterator[AugmentOp]:
    for part in transform.transforms:
        yield from getattr(part, "ops", ())  # of RandAugment and AugMix
        yield from itertools.chain(*getattr(part, "policy", ()))  # of AutoAugment


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def eval_transform(
    image_size: int | tuple[int, int], interpolation: str, crop_pct: float, normalise: dict, crop_mode: str = "center"
):
    """Return timm's test transform to images of this side, or (height, width): resize, centre crop, normalise."""
    interpolation = "bicubic" if interpolation == "random" else interpolation
    return create_transform(
        image_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, **normalise
    )
