"""The images of a run, of whatever kind: an image folder, CSV files, WebDataset shards or a Hugging Face data set.

Each kind has a module with `find_split`, `find_classes` and an `ImageSet`; all are loaded, augmented and resumed alike.
"""

from collections.abc import Sequence
from pathlib import Path

from visionmix.tools import folders, hub, manifests, remote, shards
from visionmix.tools.folders import FolderSet, find_classes, split_folder
from visionmix.tools.hub import HubSet
from visionmix.tools.images import UnreadableImage
from visionmix.tools.loading import (
    MAX_DRAWS,
    SPLITS,
    Batch,
    EpochSampler,
    ImageSet,
    Key,
    Loader,
    Repeatable,
    UnreadableData,
    collate,
    make_loader,
    seed_everything,
)
from visionmix.tools.manifests import ManifestSet
from visionmix.tools.recipe_keys import DataRecipe
from visionmix.tools.shards import ShardSet
from visionmix.tools.transforms import eval_transform, train_transform

__all__ = [
    "MAX_DRAWS",
    "SPLITS",
    "Batch",
    "EpochSampler",
    "FolderSet",
    "ImageSet",
    "Key",
    "Loader",
    "Repeatable",
    "UnreadableData",
    "UnreadableImage",
    "absolute",
    "check_data",
    "check_folders",
    "collate",
    "eval_transform",
    "find_classes",
    "make_loader",
    "open_split",
    "seed_everything",
    "split_classes",
    "split_folder",
    "train_transform",
]


_SETS = {folders: FolderSet, hub: HubSet, manifests: ManifestSet, shards: ShardSet}
_MULTILABEL = (hub, manifests)  # kinds whose images may have several labels


def _kind(wanted: DataRecipe):
    """Return the module that reads the data; raises ValueError where images of such data have other labels."""
    kind = _find_kind(wanted)
    if wanted.multilabel and kind not in _MULTILABEL:
        raise ValueError(
            f"data.multilabel=True, but images of {wanted.path} have one class each; list them with their labels in "
            "train.csv and val.csv, or in a Hugging Face data set"
        )
    if not wanted.labels and kind is not folders:
        raise ValueError(
            f"data.labels=False reads image folders alone, and {wanted.path} is none; give a folder with train/ and "
            "val/ in it"
        )
    return kind


def _find_kind(wanted: DataRecipe):
    if wanted.path.startswith(hub.PREFIX) or hub.is_saved(Path(wanted.path)):
        return hub
    places = [wanted.path, *(remote.join(wanted.path, name) for name in (wanted.train, wanted.val) if name is not None)]
    if any(manifests.has_manifests(Path(place)) for place in places):
        return manifests
    return shards if any(map(shards.has_shards, places)) else folders


def absolute(path: str) -> str:
    """Return a path or pattern that does not depend on the working directory; URLs and names on the hub stay."""
    return path if path.startswith(hub.PREFIX) or remote.is_url(path) else str(Path(path).resolve())


def split_classes(wanted: DataRecipe, split: str) -> list[str]:
    """Return the classes of one split; raises as `check_data` does."""
    kind = _kind(wanted)
    return kind.find_classes(kind.find_split(wanted.path, split, getattr(wanted, split)), wanted.classes)


def check_data(wanted: DataRecipe) -> list[str]:
    """Return the classes of a recipe's data, whose train and val must agree; none where images have no labels.

    Raises:
        OSError: the data or one of the splits is missing.
        ValueError: a split is refused, train and val hold different classes, or there is only one class.
    """
    kind = _kind(wanted)
    if not wanted.labels:
        for split in ("train", "val"):
            kind.find_split(wanted.path, split, getattr(wanted, split))
        return []
    classes, test_classes = (split_classes(wanted, split) for split in ("train", "val"))
    # A rare label may have no test image.
    if classes != test_classes and not (kind is manifests and set(test_classes) < set(classes)):
        only = {
            "train": sorted(set(classes) - set(test_classes))[:5],
            "val": sorted(set(test_classes) - set(classes))[:5],
        }
        lists = [f"only in {split}/: {', '.join(names)}" for split, names in only.items() if names]
        raise ValueError(
            f"train and val of {wanted.path} hold different classes; "
            + "; ".join(lists or ["the same in another order"])
            + "; give both the same classes"
        )
    if len(classes) == 1:
        raise ValueError(
            f"train of {wanted.path} has only one class, {classes[0]!r}, and a classifier needs two; "
            "class folders must lie directly in train/"
        )
    return classes


def check_folders(root: Path) -> list[str]:
    """Return the classes of the data in a folder with both splits; raises as `check_data` does."""
    return check_data(DataRecipe(path=str(root)))


def open_split(
    wanted: DataRecipe,
    split: str,
    classes: Sequence[str],
    transform=None,
    *,
    seed: int = 0,
    replace: bool = False,
    outputs: Sequence[int] | None = None,
) -> ImageSet:
    """Return the images of a split of a recipe's data.

    Args:
        wanted: the recipe's section.
        split: "train" or "val".
        classes: names of all classes, as `check_data` returns them.
        transform: from a PIL image to a tensor, or a tensor and its boxes; a dictionary of them where keys have sizes.
        seed: with a `Key` it determines the augmentation.
        replace: draw another image in place of an unreadable one, as training does; otherwise it is left out.
        outputs: the model's output for each of `classes`; their own order where None.

    Raises:
        OSError: the data or the split is missing.
        ValueError: the split is damaged, or holds a class that is not one of `classes`.
    """
    kind = _kind(wanted)
    found = kind.find_split(wanted.path, split, getattr(wanted, split))
    options = {"seed": seed, "replace": replace, "outputs": outputs, "count": wanted.classes}
    if kind in _MULTILABEL:
        options["multilabel"] = wanted.multilabel
    if kind is folders:
        options["labels"] = wanted.labels
    return _SETS[kind](found, classes, transform, **options)
