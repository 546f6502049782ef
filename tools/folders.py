"""Image folders: a split is a folder of class folders.

An image's class is the first folder below the split; the image may lie at any depth inside that folder. Images without
labels may lie anywhere below the split.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils.misc import natural_key

from visionmix.tools.arguments import absent
from visionmix.tools.images import find_files, is_hidden, is_image, log_left_out, read_rgb
from visionmix.tools.loading import SPLITS, ImageSet, match_classes


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split: ROOT/train, or ROOT/val (validation, test).

    Raises:
        FileNotFoundError: ROOT or the split's folder is missing.
    """
    if not root.is_dir():
        why = absent(root, folder=True)
        raise FileNotFoundError(f"data folder {root} {why}; give --data a folder with train/ and val/ in it")
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    inside = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:5]) or "no folders"
    raise FileNotFoundError(f"{root} has no {SPLITS[split][0]}/ folder (it has {inside}); put class folders in it")


def find_classes(folder: Path, count: int | None = None) -> list[str]:
    """Return the names of a split's class folders in sorted order; hidden folders are not classes.

    Raises:
        ValueError: an image lies outside the class folders, there is no class folder, one holds no image, or there are
            not `count`.
    """
    inside = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    loose = [path.name for path in inside if path.is_file() and is_image(path)]
    if loose:
        raise ValueError(
            f"{folder} holds {len(loose)} image(s) outside class folders: {', '.join(loose[:3])}; "
            f"move each into the folder of its class, as {folder.name}/CLASS/{loose[0]}"
        )
    classes = [path.name for path in inside if path.is_dir()]
    if not classes:
        raise ValueError(f"{folder} has no class folders; it must hold one folder of images for each class")
    empty = [name for name in classes if not any(map(is_image, find_files(folder / name)))]
    if empty:
        raise ValueError(
            f"{len(empty)} class folder(s) in {folder} hold no images that Pillow decodes: {', '.join(empty[:5])}; "
            "fill or remove them"
        )
    if count not in (None, len(classes)):
        raise ValueError(f"data.classes={count}, but {folder} has {len(classes)} class folders; leave it out")
    return classes


def find_split(path: str, split: str, inside: str | None = None) -> Path:
    """Return the folder of a split: PATH/`inside`, or that of `split_folder` where None.

    Raises:
        FileNotFoundError: it is missing.
    """
    if inside is None:
        return split_folder(Path(path), split)
    if not (folder := Path(path, inside)).is_dir():
        raise FileNotFoundError(f"data.{split}={inside!r}: there is no folder {folder}")
    return folder


class FolderSet(ImageSet):
    """The images of one split, by `Key`. Files that are not images are left out and logged.

    Args:
        folder: of class folders.
        classes: names of all class folders.
        transform: as `ImageSet` takes it.
        outputs: the model's output for each of `classes`; their own order where None.
        count: number of class folders, where it is known.
        labels: whether images have classes; without them `classes` is empty, and each image counts as of class 0.
        augmented: `seed` and `replace` of `ImageSet`.

    Raises:
        ValueError: `find_classes` refuses the folder, a class folder is not one of `classes`, or there is no image.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        transform,
        *,
        outputs: Sequence[int] | None = None,
        count: int | None = None,
        labels: bool = True,
        **augmented: Any,
    ) -> None:
        super().__init__(transform, **augmented)
        self.samples: list[tuple[str, int]] = []
        left_out, targets = [], {folder: 0}
        if labels:
            own = find_classes(folder, count)
            numbers = match_classes(folder, own, classes, outputs)
            targets = {folder / label: number for label, number in zip(own, numbers, strict=True)}
            left_out += [path for path in sorted(folder.iterdir()) if path.is_file() and not is_hidden(path.name)]
        for inside, target in targets.items():
            for path in find_files(inside):
                if is_image(path):
                    self.samples.append((str(path), target))
                else:
                    left_out.append(path)
        if not self.samples:  # class folders are not empty
            raise ValueError(f"{folder} holds no images that Pillow decodes; put the images of the split there")
        self.samples.sort(key=lambda sample: natural_key(sample[0]))
        log_left_out(folder, left_out)

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded RGB image and its class; raises UnreadableImage where that is not possible."""
        path, target = self.samples[index]
        return read_rgb(path), target
