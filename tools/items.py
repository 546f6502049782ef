"""Pictures to predict: files, those in folders and in tar shards, local or behind URLs, found before one is read."""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from visionmix.tools import remote, shards
from visionmix.tools.images import UnreadableImage, find_files, is_hidden, is_image, log_left_out, read_rgb

SHARD = ".tar"


class Item(NamedTuple):
    """A picture, or a shard whose end is missing.

    Attributes:
        name: the file, or SHARD:MEMBER, as text that every file can hold.
        file: that holds it, or the URL of a shard.
        offset: bytes before it in a shard.
        size: its bytes in a shard; -1 for a file of its own.
        error: why it cannot be read, where that is known already.
    """

    name: str
    file: str
    offset: int = 0
    size: int = -1
    error: str = ""

    def read(self) -> Image.Image:
        """Return the picture in RGB; raises UnreadableImage with the reason alone where that is not possible."""
        if self.error:
            raise UnreadableImage(self.error)
        source: Path | io.BytesIO = Path(self.file)
        try:
            if self.size >= 0:
                with remote.local(self.file).open("rb") as file:
                    file.seek(self.offset)
                    source = io.BytesIO(file.read(self.size))
            return read_rgb(source)
        except OSError as error:
            raise UnreadableImage(str(error)) from error
        except UnreadableImage as error:
            raise UnreadableImage(str(error).removeprefix(f"{source}: ")) from error


def _text(path: Path | str) -> str:
    """Return a path as text, with a backslash code for each byte that is none."""
    return str(path).encode(errors="backslashreplace").decode()


def find_items(paths: Sequence[Path | str]) -> list[Item]:
    """Return the pictures in files, in shards and at any depth of folders, each once, in sorted order within a folder.

    Hidden files are passed over; other files of a folder are left out and logged. Shards of URLs, which may have brace
    ranges, are fetched first.

    Raises:
        FileNotFoundError: a path or URL does not exist, or a folder holds no pictures.
        ValueError: a URL is not one of a .tar file.
        OSError: a shard cannot be fetched.
    """
    found: list[Item] = []
    for given in paths:
        if remote.is_url(str(given)):
            urls = shards.expand(str(given))
            remote.fetch(urls)
            found += [item for url in urls for item in _members(url)]
            continue
        path = Path(given)
        if path.is_dir():
            inside = sorted(find_files(path))
            wanted = [file for file in inside if is_image(file) or file.suffix == SHARD]
            if not wanted:
                raise FileNotFoundError(f"{path} holds no images that Pillow decodes, only {len(inside)} other file(s)")
            log_left_out(path, sorted(set(inside) - set(wanted)))
        elif path.is_file():
            wanted = [path]
        else:
            raise FileNotFoundError(f"{path} does not exist")
        for file in wanted:
            found += _members(str(file)) if file.suffix == SHARD else [Item(_text(file), str(file))]
    return list({item.name: item for item in found}.values())


def _members(source: str) -> Iterator[Item]:
    """Yield the pictures of a shard, of a path or URL, and if it is cut off, damaged or without any, one to say so."""
    count, error, shard = 0, "", remote.local(source)
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                hidden = any(is_hidden(part) for part in Path(member.name).parts)
                if member.isfile() and not hidden and is_image(Path(member.name)):
                    count += 1
                    yield Item(_text(f"{source}:{member.name}"), source, member.offset_data, member.size)
        with shard.open("rb") as file:  # a damaged header ends the archive without an error
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                error = "no header and no end mark"
    except (tarfile.TarError, OSError) as caught:
        error = str(caught)
    if error:
        yield Item(_text(source), source, error=f"the shard is damaged or cut off after {count} pictures: {error}")
    elif not count:
        yield Item(_text(source), source, error="the shard holds no images that Pillow decodes")


class ItemSet(Dataset):
    """Items as (place in the list, tensor or None, reason why there is none).

    Args:
        items: the pictures.
        transform: from an RGB image to a tensor.
    """

    def __init__(self, items: list[Item], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return place, self.transform(self.items[place].read()), ""
        except UnreadableImage as error:
            return place, None, str(error)


def collate(samples: list[tuple[int, torch.Tensor | None, str]]) -> tuple[list[int], torch.Tensor, dict[int, str]]:
    """Return (places of the images, images in a batch, reasons by the places of those that cannot be read)."""
    images = {place: image for place, image, _ in samples if image is not None}
    reasons = {place: reason for place, image, reason in samples if image is None}
    return list(images), torch.stack(list(images.values())) if images else torch.zeros(0), reasons
