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

from PIL import Image

from visionmix.tools.images import read_rgb
from visionmix.tools.labels import LabelSet
from visionmix.tools.loading import SPLITS

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


class ManifestSet(LabelSet):
    """The images of a CSV file, by `Key`.

    Args:
        file: with the columns image and labels.
        classes: names of all labels.
        transform: as `ImageSet` takes it.
        count: number of labels, where it is known.
        multilabel: images have any number of labels.
        options: those of `LabelSet`.

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
        count: int | None = None,
        multilabel: bool = False,
        **options: Any,
    ) -> None:
        rows = read(file)
        own = sorted({label for _, labels in rows for label in labels})
        places = {label: number for number, label in enumerate(own)}
        numbers = [[places[label] for label in labels] for _, labels in rows]
        super().__init__(file, own, classes, numbers, transform, multilabel=multilabel, **options)
        if not multilabel and (wrong := [(path, labels) for path, labels in rows if len(labels) != 1]):
            path, labels = wrong[0]
            raise ValueError(
                f"{file}: {len(wrong)} image(s) have another number of labels than one, e.g. {path} with "
                f"{len(labels)}; set data.multilabel=true, or give each one"
            )
        self.samples = [(path, numbers) for (path, _), numbers in zip(rows, self.targets, strict=True)]

    def read(self, index: int) -> Image.Image:
        """Return the decoded RGB image; raises UnreadableImage where that is not possible."""
        return read_rgb(self.samples[index][0])
