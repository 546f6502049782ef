"""Reading images: every file that Pillow decodes becomes 8-bit RGB, and folders are searched for such files.

All tools read their images here, so training, validation and prediction see the same pixels.
"""

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch.distributed as dist
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

_logger = logging.getLogger(__name__)

# Formats with a registered extension that Pillow only writes, or recognises without decoding them.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
# Beside names that begin with a dot: what macOS, Windows and Synology leave in folders.
LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}
# Modes that Pillow converts to RGB only by way of another mode, or otherwise with a warning about transparency.
VIA = {"La": "LA", "RGBa": "RGBA", "P": "RGBA"}


class UnreadableImage(ValueError):
    """A file cannot be read as an image; the message names the file and the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image`, of any of Pillow's modes, in 8-bit RGB.

    Integers of 16 bits are scaled from [0, 65535] to [0, 255], or from the own range of a TIFF with fewer bits. So is
    mode I, which Pillow uses for 16-bit PGM. Of several channels with 16 bits, Pillow keeps the high bytes. Floats
    (mode F) are scaled from [0, 1]. As in torchvision and timm, alpha is dropped, not composed, also where a palette
    has it, and the EXIF orientation is not applied.

    Raises:
        ValueError: mode I or F with values outside that range: nothing says which value is white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(image)
    if image.mode in VIA:
        image = image.convert(VIA[image.mode])
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Return an image of one channel wider than 8 bits in mode L."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF alone
    white = 1 if image.mode == "F" else 65535
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(Base.BitsPerSample, (16,))[0] - 1
    if not (values.min() >= 0 and values.max() <= white):  # false for NaN too
        raise ValueError(
            f"{getattr(image, 'filename', '') or 'the image'} has mode {image.mode!r} and values from "
            f"{values.min():g} to {values.max():g}, of which only [0, {white}] has a known meaning; "
            "scale it and save it with 8 or 16 bits per channel"
        )
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(Base.PhotometricInterpretation) == 0:  # 0 is white; Pillow inverts 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey)


def read_rgb(source: Path | str | BinaryIO) -> Image.Image:
    """Return the first frame of an image file in 8-bit RGB, as `to_rgb` converts it.

    Raises:
        UnreadableImage: the file is missing, damaged, no image, or has values without a known meaning.
    """
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{source}: not in a format that Pillow decodes") from error
    except Exception as error:  # Pillow's decoders raise a dozen types at damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(reason if str(source) in reason else f"{source}: {reason}") from error


@cache
def extensions() -> frozenset[str]:
    """Return the file extensions that Pillow decodes, in lower case with their dot."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind not in NOT_DECODED)


def is_image(path: Path) -> bool:
    """Return whether the file's name ends as that of an image, in upper or lower case."""
    return path.suffix.lower() in extensions()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped silently: .DS_Store, __MACOSX."""
    return name.startswith(".") or name in LITTER


def find_files(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth below `folder`, following links, except hidden ones and those in hidden folders."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(root, name) for name in sorted(files) if not is_hidden(name))


def log_left_out(folder: Path, files: list[Path]) -> None:
    """Log how many files below `folder` were left out and the first few names, in the first of several processes."""
    if files and not (dist.is_initialized() and dist.get_rank()):
        names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        _logger.warning("%s: left out %d file(s) that Pillow does not decode: %s%s", folder, len(files), names, more)
