"""Images a second that a loader's worker gives a core, beside timm's own loader on the same images.

Both give batches of 8-bit integers, which are normalised on the model's device. A rate is images over the CPU seconds
of the worker processes, so that it holds for a core whatever else the machine does.
"""

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.table import Table
from timm.data import ImageDataset, create_loader

from visionmix.tools import data, demo_data, display, recipe
from visionmix.tools.transforms import repair_posterize

# The mean size of ImageNet's images, and a quality at which these take about as many bytes, 110 kB.
_SIZE, _QUALITY = (500, 375), 96
_IMAGES = 24  # a photograph
_PASSES, _ROUNDS = 3, 3
_NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SETTINGS = {
    "crop and flip": {"color_jitter": 0.0, "auto_augment": None, "erase_prob": 0.0},
    "crop, flip and jitter": {"color_jitter": 0.4, "auto_augment": None, "erase_prob": 0.0},
    "imagenet/defaults.yaml": {},
}


def make_images(root: Path) -> Path:
    """Write JPEGs of ImageNet's size, parts of the photographs inside scikit-image, as an image folder; return it."""
    rng = np.random.default_rng(0)
    for label, file in demo_data.PHOTOGRAPHS.items():
        (root / label).mkdir(parents=True)
        for number in range(_IMAGES):
            width, height = _SIZE if number % 3 else _SIZE[::-1]
            photo = demo_data.open_photograph(demo_data.photograph_folder() / file, int(rng.integers(510, 700)))
            left, top = rng.integers(0, (photo.width - width + 1, photo.height - height + 1)).tolist()
            photo.crop((left, top, left + width, top + height)).save(root / label / f"{number}.jpg", quality=_QUALITY)
    return root


def ours(folder: Path, made: recipe.Recipe) -> Iterable:
    """Return this library's loader of training images, with one worker."""
    images = data.FolderSet(
        folder, data.find_classes(folder), data.train_transform(made, _NORMALISE), seed=0, replace=True
    )
    return data.make_loader(images, batch=made.data.batch_size, workers=1, shuffle=True)


def timms(folder: Path, made: recipe.Recipe) -> Iterable:
    """Return timm's loader with the same settings, without the part that normalises on the device."""
    augment = made.augment
    loader = create_loader(
        ImageDataset(str(folder)),
        input_size=(3, made.data.image_size, made.data.image_size),
        batch_size=made.data.batch_size,
        is_training=True,
        re_prob=augment.erase_prob,
        re_mode=augment.erase_mode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=made.data.interpolation,
        num_workers=1,
        device=torch.device("cpu"),
        **_NORMALISE,
    ).loader
    repair_posterize(loader.dataset.transform)
    return loader


def rate(make: Callable[[Path, recipe.Recipe], Iterable], folder: Path, made: recipe.Recipe) -> float:
    """Return images over CPU seconds of the workers, which have ended on return; the first pass warms them up."""
    loader, count, before = make(folder, made), 0, 0.0
    for number in range(_PASSES + 1):
        for batch in loader:
            images = batch.images if isinstance(batch, data.Batch) else batch[0]
            if images.dtype != torch.uint8:
                raise TypeError(f"the loader gives {images.dtype}, and 8-bit integers are compared")
            count += len(images) if number else 0
        before = before if number else _workers_seconds()
    seconds = _workers_seconds() - before
    del loader, batch
    gc.collect()
    return count / seconds


def _workers_seconds() -> float:
    import psutil  # as in timing

    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(used.user + used.system for used in times)


def run() -> list[dict[str, object]]:
    """Return a row for each of `SETTINGS`: both rates, their medians' ratio, and the least and greatest of a round."""
    rows = []
    with TemporaryDirectory() as made_in:
        folder = make_images(Path(made_in) / "train")
        sizes = [file.stat().st_size for file in folder.rglob("*.jpg")]
        for name, augment in SETTINGS.items():
            changes = [f"augment.{key}={'null' if value is None else value}" for key, value in augment.items()]
            made = recipe.read("imagenet/defaults.yaml", {}, ["data.batch_size=32", *changes])
            rounds = [(rate(ours, folder, made), rate(timms, folder, made)) for _ in range(_ROUNDS)]
            ratios = [mine / theirs for mine, theirs in rounds]
            rows.append(
                {
                    "settings": name,
                    "visionmix": median(mine for mine, _ in rounds),
                    "timm": median(theirs for _, theirs in rounds),
                    "ratio": median(ratios),
                    "least": min(ratios),
                    "greatest": max(ratios),
                    "images": len(sizes),
                    "kilobytes": sum(sizes) / len(sizes) / 1e3,
                }
            )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows."""
    size = "x".join(map(str, _SIZE))
    table = Table(title=f"images a second a core, to 224 pixels, of JPEGs of {size} and {rows[0]['kilobytes']:.0f} kB")
    for column in ("training transforms", "visionmix", "timm", "ratio", "of single rounds"):
        table.add_column(column)
    for row in rows:
        rates = [f"{row[name]:.0f}" for name in ("visionmix", "timm")]
        table.add_row(row["settings"], *rates, f"{row['ratio']:.2f}", f"{row['least']:.2f} to {row['greatest']:.2f}")
    display.table_console().print(table)
