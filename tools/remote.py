"""Files behind http:// and https:// URLs: fetched once into a cache folder, from which all processes read them.

The folder is ~/.cache/visionmix, or that of the environment's VISIONMIX_CACHE. A file lies in it as HOST/PATH of its
URL, and is taken to be that of the server for good; remove it there to fetch it again.

A file gets its name when all its bytes are on disk. torch.hub and webdataset also download, but the one waits for ever
for a server that stops sending, and neither compares what came with the length that was announced.
"""

import contextlib
import glob
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch.distributed as dist
from huggingface_hub.utils import WeakFileLock
from rich.progress import Progress

from visionmix.tools import display
from visionmix.tools.checkpoint import write_aside

CACHE = "VISIONMIX_CACHE"
TRIES = 5
WAIT = 1.0  # seconds before the second try; each further one waits twice as long
TIMEOUT = 60.0  # seconds without a byte after which a try is over
AT_ONCE = 4  # downloads of a process
_CHUNK = 2**20
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may not meet


class _Failed(Exception):
    """A try failed, for the reason in `args`; another one may succeed, unless `final` is the error to raise."""

    final: OSError | None = None


def is_url(name: str) -> bool:
    """Return whether a name begins with http:// or https://."""
    return name.startswith(("http://", "https://"))


def join(path: str, inside: str) -> str:
    """Return the path or URL of `inside` below `path`; where `inside` is absolute or a URL, it comes back itself."""
    if is_url(path) and not is_url(inside):
        return f"{path.rstrip('/')}/{inside}"
    return inside if is_url(inside) else str(Path(path, inside))


def local(name: str) -> Path:
    """Return where a file lies on this machine, once it is fetched: a path itself, or its URL's place in the cache.

    Raises:
        ValueError: the URL is not one of a file, or has a query.
    """
    if not is_url(name):
        return Path(name)
    parts = urlsplit(name)
    steps = [unquote(step) for step in parts.path.split("/")[1:]]
    unsafe = any(step in ("", ".", "..") or "/" in step for step in steps)
    if unsafe or not steps or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"{name} is not the URL of a file; give http://host/folder/file, without ?query and #fragment")
    cache = Path(os.environ.get(CACHE) or "~/.cache/visionmix").expanduser()
    return cache.joinpath(parts.netloc.rpartition("@")[2], *steps)


def fetch(names: Sequence[str]) -> list[Path]:
    """Return where files lie on this machine; those behind URLs are fetched first, unless they are in the cache.

    Raises:
        ValueError: as `local` has it.
        OSError: the server does not have a file (FileNotFoundError), refuses it (PermissionError), or could not be
            reached in several tries (ConnectionError); or the disk is full.
    """
    paths = [local(name) for name in names]
    missing = {name: path for name, path in zip(names, paths, strict=True) if is_url(name) and not path.is_file()}
    if missing:
        console = display.table_console()
        hidden = not console.is_terminal or (dist.is_initialized() and dist.get_rank() > 0)
        with Progress(console=console, transient=True, disable=hidden) as progress, ThreadPoolExecutor(AT_ONCE) as pool:
            fetched = pool.map(_fetch, missing, missing.values())
            for _ in progress.track(fetched, len(missing), description="fetching"):
                pass
    return paths


def fetch_if_there(name: str) -> None:
    """Fetch a file as `fetch` does, unless the server says that it has none, or none for us."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        fetch([name])


def _fetch(url: str, path: Path) -> None:
    """Write the file of a URL to `path`; of several processes one does it, while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*"):  # by a process that was killed
            left.unlink()
        for number in range(TRIES):
            try:
                write_aside(path, lambda aside: _download(url, aside))
                return
            except _Failed as error:
                if error.final:
                    raise error.final from error
                cause = error
            if number + 1 < TRIES:
                time.sleep(WAIT * 2**number)
    raise ConnectionError(
        f"{url} could not be fetched in {TRIES} tries: {cause}; see whether this machine reaches the server, and make "
        "the call again, which goes on with the files that are missing"
    )


def _download(url: str, aside: Path) -> None:
    with aside.open("wb") as file:
        for content in _read(url):
            file.write(content)


def _read(url: str) -> Iterator[bytes]:
    """Yield the bytes of a file, all of them; raises _Failed otherwise."""
    size = 0
    try:
        with urlopen(Request(url, headers={"User-Agent": "visionmix"}), timeout=TIMEOUT) as answer:
            length = answer.headers["Content-Length"]
            if length is None and answer.headers["Transfer-Encoding"] != "chunked":
                raise _failed(f"the server does not say how long {url} is; let it send Content-Length", OSError)
            while content := answer.read(_CHUNK):
                size += len(content)
                yield content
    except HTTPError as error:
        status = f"HTTP {error.code} {error.reason}"
        if error.code in _PASSING:
            raise _failed(status) from error
        if error.code in (404, 410):
            raise _failed(
                f"the server has no {url} ({status}); check the name and its numbers", FileNotFoundError
            ) from error
        raise _failed(
            f"the server refuses {url} ({status}); fetch it by other means and give its path", PermissionError
        ) from error
    except (OSError, HTTPException) as error:
        raise _failed(str(getattr(error, "reason", "") or error) or type(error).__name__) from error
    if length is not None and size != int(length):
        raise _failed(f"the connection ended after {size} of {length} bytes")


def _failed(reason: str, final: type[OSError] | None = None) -> _Failed:
    error = _Failed(reason)
    error.final = final(reason) if final else None
    return error
