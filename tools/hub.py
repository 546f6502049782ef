"""Hugging Face image data sets: by name on the hub, or in a folder that `save_to_disk` wrote."""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from visionmix.tools.images import UnreadableImage, read_rgb
from visionmix.tools.labels import LabelSet
from visionmix.tools.loading import SPLITS
from visionmix.tools.optional import load

PREFIX = "hf:"
library = partial(load, "datasets", "hub", "Hugging Face data sets")


def is_saved(path: Path) -> bool:
    """Return whether `path` is a folder that `save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def find_split(path: str, split: str, inside: str | None = None):
    """Return a split of a data set, as `datasets.Dataset`.

    Args:
        path: "hf:NAME", or a folder that `save_to_disk` wrote.
        split: "train" or "val".
        inside: its own name, e.g. "train[:90%]" on the hub, in place of looking for it.

    Raises:
        FileNotFoundError: the data set, or such a split, does not exist.
    """
    datasets = library()
    try:
        if path.startswith(PREFIX):
            name = path.removeprefix(PREFIX)
            if inside is not None:
                return datasets.load_dataset(name, split=inside)
            found = datasets.load_dataset(name)
        else:
            found = datasets.load_from_disk(path)
    except (ValueError, OSError) as error:  # the library's own errors are of these
        raise FileNotFoundError(f"{path} cannot be loaded as a Hugging Face data set: {error}") from error
    if not isinstance(found, datasets.DatasetDict):
        raise FileNotFoundError(f"{path} has no splits; save a DatasetDict with train and validation")
    wanted = [inside] if inside is not None else SPLITS[split]
    for name in wanted:
        if name in found:
            return found[name]
    raise FileNotFoundError(
        f"{path} has no split {' or '.join(wanted)} (it has {', '.join(found)}); name it in data.{split}"
    )


def find_classes(dataset, count: int | None = None) -> list[str]:
    """Return the names of the classes, or the numbers below `count` where labels are plain integers.

    Raises:
        ValueError: there is not one column of images and one of labels, or the number of classes is not known.
    """
    label = _label(dataset.features[_columns(dataset)[1]])
    names = getattr(label, "names", None)
    if names is None and count is None:
        raise ValueError(f"the labels of {dataset.info.dataset_name or 'the data set'} are plain integers; "
                         "give the number of classes in data.classes")  # fmt: skip
    if names is None:
        return [str(number) for number in range(count)]
    if count not in (None, len(names)):
        raise ValueError(f"data.classes={count}, but the labels have {len(names)} names; leave it out")
    return names


def _label(feature):
    """Return the feature of one label: that of a column, or of the items of its lists."""
    return getattr(feature, "feature", feature)


def _columns(dataset) -> tuple[str, str]:
    """Return the names of the columns with images and labels."""
    datasets = library()
    features = dataset.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(_label(kind), datasets.ClassLabel)]
    if not labels:
        labels = [name for name in ("label", "labels") if getattr(_label(features.get(name)), "dtype", "") == "int64"]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"the data set has columns {', '.join(features)}, with {len(images)} of images and {len(labels)} of labels "
            "(ClassLabel, or integers called label, or lists of them); it needs one of each: cast or remove the others "
            "and save it"
        )
    return images[0], labels[0]


class HubSet(LabelSet):
    """The images of one split of a data set, by `Key`.

    Args:
        dataset: the split.
        classes: names of all classes.
        transform: as `ImageSet` takes it.
        count: number of classes, where labels are plain integers.
        multilabel: images have lists of labels.
        options: those of `LabelSet`.

    Raises:
        ValueError: `find_classes` refuses the data set, an image has no class, or the labels are lists and
            `multilabel` is not set, or the reverse.
    """

    def __init__(
        self,
        dataset,
        classes: Sequence[str],
        transform,
        *,
        count: int | None = None,
        multilabel: bool = False,
        **options: Any,
    ) -> None:
        own = find_classes(dataset, count)
        self.name = f"{dataset.info.dataset_name or 'data set'} {dataset.split or ''}".strip()
        self.column, label = _columns(dataset)
        if hasattr(dataset.features[label], "feature") != multilabel:
            raise ValueError(
                f"the column {label} of {self.name} has {'one label' if multilabel else 'a list of labels'} an image; "
                f"set data.multilabel={not multilabel}"
            )
        targets = dataset[label]
        lists = targets if multilabel else [[target] for target in targets]
        if wrong := [
            place
            for place, numbers in enumerate(lists)
            if numbers is None or any(number is None or not 0 <= number < len(own) for number in numbers)
        ]:
            raise ValueError(
                f"{len(wrong)} image(s) of {self.name} have no class, e.g. number {wrong[0]} with label "
                f"{targets[wrong[0]]}; remove them with Dataset.filter"
            )
        super().__init__(self.name, own, classes, lists, transform, multilabel=multilabel, **options)
        self.dataset = dataset.cast_column(self.column, library().Image(decode=False)).select_columns(self.column)

    def read(self, index: int) -> Image.Image:
        """Return the decoded RGB image; raises UnreadableImage where that is not possible."""
        stored = self.dataset[index][self.column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise UnreadableImage(f"{self.name}[{index}]: is empty")
        if stored["bytes"] is None:
            return read_rgb(stored["path"])
        content = _Row(stored["bytes"])
        content.place = f"{self.name}[{index}]" + (f" ({stored['path']})" if stored["path"] else "")
        return read_rgb(content)


class _Row(io.BytesIO):
    """The bytes of an image, which says where they come from."""

    def __str__(self) -> str:
        return self.place
