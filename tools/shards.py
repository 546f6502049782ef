"""WebDataset shards as a set of images: tar files, read at any place by the offsets of what lies in them.

A sample is what shares a name up to its first dot: an image, and its class as a number in a file that ends in .cls.
`visionmix pack` writes beside its shards an index with the offsets, the classes' names and checksums. Shards without
one are read through once at the start, and the number of their classes must be given.

An image is read where it lies, so the order of an epoch, its share among processes and workers and its place in the
middle are those of any other data set: functions of (seed, epoch) alone.
"""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionmix.tools import remote
from visionmix.tools.images import UnreadableImage, extensions, is_hidden, read_rgb
from visionmix.tools.loading import SPLITS, ImageSet, match_classes
from visionmix.tools.optional import load

_logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = 1
_BLOCK = 512  # bytes of a tar header
library = partial(load, "webdataset", "shards", "shards")


@dataclass
class Table:
    """Where the images of a shard lie.

    Attributes:
        offsets: first byte of each image, int64 (samples,).
        sizes: bytes of each image, int64 (samples,).
        targets: class index of each, int64 (samples,).
    """

    offsets: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray


def has_shards(path: str) -> bool:
    """Return whether `path` is a URL, a pattern of .tar files, or a folder with some in it or in a split's folder.

    A folder with .tar files beside other folders is an image folder, in which an archive was left.
    """
    if remote.is_url(path) or path.endswith(".tar"):
        return True
    folders = [Path(path), *(Path(path, name) for names in SPLITS.values() for name in names)]
    return any(_is_of_shards(folder) for folder in folders if folder.is_dir())


def _is_of_shards(folder: Path) -> bool:
    return any(folder.glob("*.tar")) and not any(
        path.is_dir() and not is_hidden(path.name) for path in folder.iterdir()
    )


def expand(pattern: str) -> list[str]:
    """Return the files or URLs of a brace pattern, e.g. train-{0000..1023}.tar.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ValueError: a URL is not one of a .tar file.
    """
    names = library().shardlists.expand_urls(pattern)
    for url in filter(remote.is_url, names):
        if remote.local(url).suffix != ".tar":
            raise ValueError(
                f"{url} is not the URL of a .tar file; give a pattern of them, such as {url.rstrip('/')}/"
                "{train-{0000..1023},val-{00..63}}.tar, since folders of a server cannot be listed"
            )
    if missing := [name for name in names if not remote.is_url(name) and not Path(name).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} shards of {pattern} do not exist, e.g. {missing[0]}; "
            "check the pattern's numbers"
        )
    return names


def find_split(path: str, split: str, inside: str | None = None) -> list[Path]:
    """Return the shards of a split, on this machine: those behind URLs are fetched first.

    Args:
        path: folder, or brace pattern of files or URLs.
        split: "train" or "val". A shard belongs to it by its folder's name, or by a word of its own.
        inside: folder or brace pattern of this split, below `path`, absolute or of URLs, in place of looking for it.

    Raises:
        FileNotFoundError: there are none, or one of a pattern is missing.
        ValueError: a URL is not one of a .tar file.
        OSError: a shard cannot be fetched.
    """
    place = path if inside is None else remote.join(path, inside)
    folder = Path(place)
    own = [folder / name for name in SPLITS[split] if inside is None and (folder / name).is_dir()]
    found = sorted(map(str, (own or [folder])[0].glob("*.tar"))) if folder.is_dir() else expand(place)
    if inside is None and not own:
        found = [name for name in found if is_of_split(name, split)]
    if not found:
        raise FileNotFoundError(
            f"{place} has no shards of {split}; name it in data.{split}, as a folder or a pattern of .tar files, "
            f"or let their folder or names have the word {split}"
        )
    return _fetch(found)


def _fetch(names: Sequence[str]) -> list[Path]:
    """Return the shards' files; of those that are fetched, the index comes first, where the server has one."""
    missing = [name for name in names if not remote.local(name).is_file()]
    for folder in sorted({name.rpartition("/")[0] for name in missing}):
        remote.fetch_if_there(f"{folder}/{INDEX}")
    return remote.fetch(names)


def is_of_split(name: str, split: str) -> bool:
    """Return whether the folder of a shard has the name of a split, or its own name has that word."""
    words = re.findall(r"[a-z]+", Path(name).stem.lower())
    return bool({Path(name).parent.name, *words} & {*SPLITS[split]})


def find_classes(files: Sequence[Path], count: int | None = None) -> list[str]:
    """Return the names of the classes: those of the index, or the numbers below `count` where there is none.

    Raises:
        ValueError: there is no index and no count, there are both and they differ, or the index is damaged.
    """
    indexes = {folder: read_index(folder / INDEX) for folder in sorted({file.parent for file in files})}
    found = {folder: index and index["classes"] for folder, index in indexes.items()}
    folder, classes = next(iter(found.items()))
    if differing := [str(other) for other, names in found.items() if names != classes]:
        raise ValueError(f"{folder} and {differing[0]} hold shards of different classes; pack them together")
    if classes is None and count is None:
        raise ValueError(
            f"{folder} has no {INDEX}, as visionmix pack writes it once all shards are whole; "
            "give the number of classes in data.classes, or pack again"
        )
    if classes is None:
        return [str(number) for number in range(count)]
    if count not in (None, len(classes)):
        raise ValueError(f"data.classes={count}, but {folder / INDEX} names {len(classes)}; leave it out")
    return classes


def read_index(path: Path) -> dict[str, Any] | None:
    """Return the content of an index, its shards by their name, or None where there is no such file.

    Raises:
        ValueError: it is damaged or of another format.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"it has format={content['format']!r}, this version reads format={FORMAT}")
        classes, shards = content["classes"], {shard["name"]: shard for shard in content["shards"]}
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("its classes are no names")
        for shard in shards.values():
            shard["table"] = table = Table(*(np.array(shard.pop(name), np.int64) for name in Table.__annotations__))
            if not len(table.offsets) == len(table.sizes) == len(table.targets) == shard["samples"]:
                raise ValueError(f"the samples of {shard['name']} are miscounted")
            ends = table.offsets + table.sizes
            inside = ((table.offsets >= _BLOCK) & (table.sizes >= 0) & (ends <= shard["bytes"])).all()
            if not (inside and ((table.targets >= 0) & (table.targets < len(classes))).all()):
                raise ValueError(f"{shard['name']} has samples beyond its end or without a class")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no index of shards ({type(error).__name__}: {error}); pack again") from error
    return {"classes": classes, "shards": shards}


def scan(shard: Path) -> tuple[Table, list[str]]:
    """Read through the headers of a shard; return where its images lie, and a line for each sample that is left out.

    Raises:
        ValueError: the file is no plain tar archive.
    """
    rows, left_out = [], []
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in groupby(_members(shard, archive, left_out), key=lambda member: member[0]):
                named = {end: member for _, end, member in members}
                ends = [end for end in named if f".{end.rpartition('.')[2]}" in extensions()]
                if not ends or "cls" not in named:
                    left_out.append(f"{shard}:{key}: has no {'class in a .cls file' if ends else 'image'}")
                    continue
                image = named[ends[0]]
                text = archive.extractfile(named["cls"]).read()
                if not re.fullmatch(rb"\s*\d+\s*", text):
                    left_out.append(f"{shard}:{key}: its class {text[:20]!r} is no number")
                    continue
                rows.append((image.offset_data, image.size, int(text)))
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no plain .tar file ({error}); unpack what is compressed, or copy it again"
        ) from error
    return Table(*np.array(rows, np.int64).reshape(-1, 3).T), left_out


def _members(shard: Path, archive: tarfile.TarFile, left_out: list[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (sample, ending in lower case, member) of each file, as webdataset splits names, until the shard ends."""
    split_name = library().tariterators.base_plus_ext
    size = shard.stat().st_size
    try:
        for member in archive:
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            key, end = split_name(member.name)
            if member.isfile() and key is not None:
                yield key, end.lower(), member
        with shard.open("rb") as file:  # a damaged header ends the archive without an error
            file.seek(archive.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("no tar header and no end mark")
    except tarfile.ReadError as error:
        left_out.append(f"{shard}: is cut off or damaged, and the samples after it are left out ({error})")


class ShardSet(ImageSet):
    """The images of one split's shards, by `Key`. Samples without an image or class are left out and logged.

    Args:
        files: the shards.
        classes: names of all classes.
        transform: as `ImageSet` takes it.
        outputs: the model's output for each of `classes`; their own order where None.
        count: number of classes, where shards have no index.
        augmented: `seed` and `replace` of `ImageSet`.

    Raises:
        ValueError: `find_classes` refuses the shards, one of them is not the one that the index describes, or holds a
            class beyond `count`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        classes: Sequence[str],
        transform,
        *,
        outputs: Sequence[int] | None = None,
        count: int | None = None,
        **augmented: Any,
    ) -> None:
        super().__init__(transform, **augmented)
        self.files = [str(file) for file in files]
        own = find_classes(files, count)
        tables = list(_tables(files, len(own)))
        self.shard = np.repeat(np.arange(len(files)), [len(table.offsets) for table in tables])
        self.offsets = np.concatenate([table.offsets for table in tables])
        self.sizes = np.concatenate([table.sizes for table in tables])
        targets = np.array(match_classes(files[0].parent, own, classes, outputs), np.int64)
        self.targets = targets[np.concatenate([table.targets for table in tables])]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded RGB image and its class; raises UnreadableImage where that is not possible."""
        file, offset, size = self.files[self.shard[index]], int(self.offsets[index]), int(self.sizes[index])
        try:
            with Path(file).open("rb", buffering=0) as shard:
                shard.seek(offset)
                content = _Member(shard.read(size))
        except OSError as error:
            raise UnreadableImage(f"{file}: {error.strerror}") from error
        content.place = file, offset
        return read_rgb(content), int(self.targets[index])


class _Member(io.BytesIO):
    """The bytes of an image, which says where they come from: the shard and the name in it."""

    def __str__(self) -> str:
        file, offset = self.place
        try:
            with Path(file).open("rb") as shard:
                shard.seek(offset - _BLOCK)
                name = tarfile.TarInfo.frombuf(shard.read(_BLOCK), "utf-8", "replace").name
        except (OSError, tarfile.TarError):
            name = f"byte {offset}"
        return f"{file}:{name}"


def _tables(files: Sequence[Path], classes: int) -> Iterator[Table]:
    """Yield the table of each shard, of its folder's index where there is one."""
    indexes = {folder: read_index(folder / INDEX) for folder in {file.parent for file in files}}
    left_out: list[str] = []
    for file in files:
        index = indexes[file.parent]
        if index is None:
            table, lines = scan(file)
            left_out += lines
            if (beyond := table.targets[table.targets >= classes]).size:
                raise ValueError(f"{file} holds class {beyond[0]}, and data.classes={classes}; raise it")
            yield table
            continue
        if file.name not in index["shards"]:
            raise ValueError(f"{file} is not in {file.parent / INDEX}; pack again, or remove one of them")
        entry = index["shards"][file.name]
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, and its index says {entry['bytes']}; copy it again"
            )
        yield entry["table"]
    for line in left_out[:5]:
        _logger.warning("left out: %s", line)
    if len(left_out) > 5:
        _logger.warning("left out: %d more sample(s) or shard(s)", len(left_out) - 5)
