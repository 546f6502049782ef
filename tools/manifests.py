"""Images listed in CSV files: train.csv and val.csv with the columns image and labels.

    image,labels
    photos/0001.jpg,cat;sofa
    photos/0002.jpg,

Paths begin where the file lies. Labels have semicolons between them, any number with `data.multilabel`, otherwise one.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionmix.tools.images import read_rgb
from visionmix.tools.loading import SPLITS, ImageSet, match_classes, multi_hot

COLUMNS = ("image", "labels")


def has_manifests(path: Path) -> bool:
    """Return whether a folder has the CSV file of a split, or `path` is such a file."""
    return path.suffix == ".csv" or any((path / f"{name}.csv").is_file() for names in SPLITS.values() for name in names)


def find_split(path: str, split: str, inside: str | None = None) -> Path:
    """Return the CSV file of a split: PATH/`inside`, or train.csv or val.csv (validation, test) in PATH where None.

    Raises:
        FileNotFoundError: it is missing.
    """
    names = [inside] if inside is not None else [f"{name}.csv" for name in SPLITS[split]]
    for name in names:
        if (file := Path(path, name)).is_file():
            return file
    raise FileNotFoundError(f"{path} has no {' or '.join(names)}; name the CSV file of {split} in data.{split}")


def find_classes(file: Path, count: int | None = None) -> list[str]:
    """Return the labels of a CSV file in sorted order; those of the test images may be fewer than of the training's.

    Raises:
        ValueError: it is no such file, has no images or labels, or not `count` labels.
    """
    classes = sorted({label for _, labels in read(file) for label in labels})
    if not classes:
        raise ValueError(f"{file} has no labels; write them into its column labels, with semicolons between them")
    if count not in (None, len(classes)):
        raise ValueError(f"data.classes={count}, but {file} has {len(classes)} labels; leave it out")
    return classes


def read(file: Path) -> list[tuple[str, list[str]]]:
    """Return (path, labels) of each image in a CSV file.

    Raises:
        ValueError: it is no CSV file in UTF-8 with these columns, lists no images, or a line names none.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened, strict=True)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
                raise ValueError(f"{file} has no column {' or '.join(missing)}; its first line must name both")
            rows = [(table.line_num, row["image"], row["labels"]) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise ValueError(f"{file} lists no images")
    if wrong := [line for line, image, labels in rows if not image or labels is None]:
        raise ValueError(f"{file} has no image or labels in line {wrong[0]}; give both, the labels perhaps empty")
    return [
        (str(file.parent / image), list(dict.fromkeys(filter(None, map(str.strip, labels.split(";"))))))
        for _, image, labels in rows
    ]


class ManifestSet(ImageSet):
    """The images of a CSV file, by `Key`.

    Args:
        file: with the columns image and labels.
        classes: names of all labels.
        transform: as `ImageSet` takes it.
        outputs: the model's output for each of `classes`; their own order where None, and with `multilabel`.
        count: number of labels, where it is known.
        multilabel: targets are of any number of labels, as `multi_hot` returns them, not one class.
        augmented: `seed` and `replace` of `ImageSet`.

    Raises:
        ValueError: `read` refuses the file, a label is not one of `classes`, or without `multilabel` an image has
            another number of labels than one.
    """

    def __init__(
        self,
        file: Path,
        classes: Sequence[str],
        transform,
        *,
        outputs: Sequence[int] | None = None,
        count: int | None = None,
        multilabel: bool = False,
        **augmented: Any,
    ) -> None:
        super().__init__(transform, **augmented)
        rows = read(file)
        own = sorted({label for _, labels in rows for label in labels})
        numbers = dict(zip(own, match_classes(file, own, classes, None if multilabel else outputs), strict=True))
        if not multilabel and (wrong := [(path, labels) for path, labels in rows if len(labels) != 1]):
            path, labels = wrong[0]
            raise ValueError(
                f"{file}: {len(wrong)} image(s) have another number of labels than one, e.g. {path} with "
                f"{len(labels)}; set data.multilabel=true, or give each one"
            )
        self.samples = [(path, [numbers[label] for label in labels]) for path, labels in rows]
        self.labels = len(classes) if multilabel else None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int | torch.Tensor]:
        """Return the decoded RGB image and its target; raises UnreadableImage where that is not possible."""
        path, numbers = self.samples[index]
        return read_rgb(path), numbers[0] if self.labels is None else multi_hot(numbers, self.labels)
