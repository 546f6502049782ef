"""Checks of arguments that several tools share."""

import os
from collections.abc import Sequence
from pathlib import Path


def check_least(least: int, **numbers: int | None) -> None:
    """Raise ValueError, with its name and value, at the first of `numbers` below `least`; None stands for not given."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is too small; it must be at least {least}")


def absent(path: Path, *, folder: bool = False) -> str:
    """Return, for messages, why there is no file, or no folder, at `path`."""
    if not path.exists():
        return "does not exist"
    return "is a file; give a folder" if folder else "is a folder; give a file"


def check_out(path: Path, suffixes: Sequence[str] = (), name: str = "--out") -> None:
    """Check, before any work, that a file can be written at `path`.

    Args:
        path: of the file, which may exist.
        suffixes: of which its name must have one; any, if none is given.
        name: of the argument, for messages.

    Raises:
        ValueError: it is a folder, lies below a file or where nothing can be written, or its name ends otherwise.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{name}={path} does not end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{name}={path} is a folder; give a file in it")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise ValueError(f"{name}={path} lies below {folder}, which is a file; give another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={path} lies in {folder}, where nothing may be written; give another place")
