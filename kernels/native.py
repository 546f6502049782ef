"""Compiling the C++ kernels at first use, and loading them.

A kernel is a C++17 file without torch headers, called through ctypes. It is compiled for this machine's CPU into a
per-user cache: `VISIONMIX_CACHE`, else the platform's cache folder, else, where that cannot be written, a private
folder among the temporary files.
"""

import ctypes
import hashlib
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from visionmix.kernels.dispatch import Unavailable, compute_dtype, log_slow_path

_logger = logging.getLogger("visionmix.kernels")

CACHE_VARIABLE = "VISIONMIX_CACHE"

# No -ffast-math and no -Ofast: a library built with them flushes denormals in the whole process that loads it.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")

_COMPILE_SECONDS = 300
_ERROR_LINES = 6
_INSTALL = "install g++ or clang, or set CXX"
_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def threads() -> int:
    """Return the number of threads a kernel is to run: torch's, but one in a forked child.

    A fork copies no threads, and the OpenMP runtime of the child waits for those of its parent.
    """
    return 1 if _forked else torch.get_num_threads()


def leaves_to_reference(op: str, *tensors: torch.Tensor | None) -> bool:
    """Return whether `op` must run its reference on `tensors`, since compiled kernels have no float64; log it once."""
    if compute_dtype(*tensors) != torch.float64:
        return False
    log_slow_path(op, "the compiled kernel has no float64", "pass float32 tensors where that is enough")
    return True


# What the elements of a tensor are, as elements.h numbers them. Kernels read these as they lie and compute in float32.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def readable(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, in float32 if kernels cannot read it as it is."""
    return x if x.dtype in KINDS else x.float()


# The stride of an axis of length 1 means nothing: views leave any number there, and `contiguous()` keeps it. Kernels
# only ever multiply a stride by an index, which is 0 there; anything else that depends on strides is in these
# functions.


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with its last axis dense, in a type that kernels read; the other strides may be any."""
    x = readable(x)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def with_joint_cells(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return `x` in float32 with its last axis dense, and the stride of axes 1 and 2 taken as one; else a copy."""
    x = x.float()
    shape, strides = x.shape, x.stride()
    along = 2 if shape[2] > 1 else 1
    cell = strides[along]
    if (strides[-1] != 1 and shape[-1] > 1) or (shape[1] > 1 and strides[1] != shape[2] * cell):
        x = x.contiguous()
        cell = x.stride(along)
    return x, cell


@cache
def load(source: Path, *structures: type[ctypes.Structure]) -> ctypes.CDLL:
    """Return the library compiled from `source`, a C++ file; compile it unless the cache holds it.

    Args:
        structures: the structures that mirror those of the source, under the same names, with or without an underscore
            in front. The source exports the size of each (`EXPORT_SIZE`).

    Raises:
        Unavailable: there is no compiler, it fails, or no folder can hold a library.
        RuntimeError: a structure's fields or size are not those of the source.
    """
    library = _compiled(source)
    for structure in structures:
        _check_structure(source, library, structure)
    return library


def _check_structure(source: Path, library: ctypes.CDLL, structure: type[ctypes.Structure]) -> None:
    """Refuse a structure that differs from its C++ twin, since calls would read and write the wrong memory."""
    name = structure.__name__.lstrip("_")
    ours, theirs = [field[0] for field in structure._fields_], _fields("\n".join(_texts(source)), name)
    size = getattr(library, f"size_of_{name}")
    size.restype = ctypes.c_int64
    bytes_ours, bytes_theirs = ctypes.sizeof(structure), size()
    if ours == theirs and bytes_ours == bytes_theirs:
        return
    pairs = itertools.zip_longest(ours, theirs, fillvalue="nothing")
    difference = next((f"{mine} stands where C++ has {other}; " for mine, other in pairs if mine != other), "")
    raise RuntimeError(
        f"{name} of {source.parent.name} has {bytes_ours} bytes in cpu.py and {bytes_theirs} in C++: {difference}"
        "change both alike, or reinstall visionmix if neither was changed"
    )


def _fields(text: str, name: str) -> list[str]:
    """Return the names of the fields of a C++ structure, in order."""
    text = re.sub(r"//.*", "", text)
    found = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)
    if found is None:
        raise RuntimeError(f"the C++ source has no structure {name}; the one in cpu.py must have the same name")
    without_functions, braces = found[1], 1
    while braces:  # from the innermost ones outwards
        without_functions, braces = re.subn(r"[^;{}]*\{[^{}]*\}", "", without_functions)
    return [
        re.search(r"(\w+)\s*(\[\d+\])?\s*$", declared)[1]
        for line in without_functions.split(";")
        if line.strip()
        for declared in line.split(",")
    ]


def _compiled(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    flags, libraries = _options()
    name = f"{source.parent.name}-{source.stem}-{_key(source, compiler, [*flags, *libraries])}"
    # The source comes before the libraries: the linker reads them in order.
    command = [*compiler, *flags, str(source), *libraries]
    failures: list[str] = []
    for choose in (cache_folder, _private_folder):
        try:
            folder = choose()
            library = _load_from(folder / name, command)
        except OSError as error:
            failures.append(str(error))
            continue
        if failures:
            _logger.warning(
                "compiled kernels are kept in %s, because the cache cannot be used (%s); set %s to a folder that can",
                folder,
                failures[0],
                CACHE_VARIABLE,
            )
        return library
    raise Unavailable(
        f"compiled kernels cannot be stored or loaded ({'; '.join(failures)})",
        f"set {CACHE_VARIABLE} to a writable folder on a file system that allows execution",
    )


def _options() -> tuple[list[str], list[str]]:
    """Return the flags for this machine, and the libraries."""
    if sys.platform == "darwin":
        # Apple's clang knows OpenMP but brings no runtime: torch's own is linked.
        runtime = Path(torch.__file__).parent / "lib"
        target = "-mcpu=native" if platform.machine() == "arm64" else "-march=native"
        return [*FLAGS, target, "-Xclang", "-fopenmp"], [f"-L{runtime}", f"-Wl,-rpath,{runtime}", "-lomp"]
    # torch's own runtime, which some wheels rename: a second runtime would start its own threads.
    return [*FLAGS, "-march=native", "-fopenmp"], ["-Wl,--as-needed", *_loaded_openmp()]


def _compiler() -> list[str]:
    if sys.platform == "win32":
        raise Unavailable("compiled kernels are not built on Windows", "run under WSL or Linux for faster kernels")
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise Unavailable(f"the compiler CXX={chosen!r} is not found", _INSTALL)
        return command
    for name in ("c++", "g++", "clang++", "clang"):
        if path := shutil.which(name):
            return [path]
    raise Unavailable("no C++ compiler is found (c++, g++, clang++)", _INSTALL)


def _loaded_openmp() -> list[str]:
    with suppress(OSError):
        paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return sorted(path for path in paths if Path(path).name.startswith("libgomp") and Path(path).is_file())[:1]
    return []


@cache
def _cpu() -> str:
    """Return the facts that the compiler's native target depends on."""
    if sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return platform.machine() + name.stdout
    fields = r"(vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+)\s*:"
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        return platform.machine() + "\n".join(line for line in first.splitlines() if re.match(fields, line))
    return platform.machine() + platform.processor()


def _version(compiler: list[str]) -> str:
    try:
        run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler {shlex.join(compiler)} does not run ({error})", _INSTALL) from error
    return run.stdout


def _texts(source: Path) -> Iterator[str]:
    """Yield the text of `source` and of the files that it includes by quotes, directly or not."""
    pending, seen = [source.resolve()], set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        yield text
        pending += [(path.parent / name).resolve() for name in re.findall(r'^\s*#include "(.+)"', text, re.MULTILINE)]


def _key(source: Path, compiler: list[str], options: list[str]) -> str:
    parts = [*_texts(source), *compiler, _version(compiler), *options, _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Return the folder of the user's choice or the platform's, created where it is missing."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or Path(cache_home, "visionmix")).expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _private_folder() -> Path:
    """Return this user's own folder among the temporary files; refuse one that another user could write into."""
    folder = Path(tempfile.gettempdir()) / f"visionmix-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows

    with path.open("w") as file:
        # Some network file systems know no locks: processes that start together then compile side by side.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _intact(library: Path) -> bool:
    """Return whether the cached library is whole: loading one that is cut short can end the process."""
    try:
        digest = library.with_suffix(".sha256").read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == digest
    except (OSError, UnicodeDecodeError):
        return False


def _load_from(stem: Path, command: list[str]) -> ctypes.CDLL:
    library = stem.with_suffix(".so")
    if not _intact(library):
        with _locked(stem.with_suffix(".lock")):
            if not _intact(library):
                _compile(library, command)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # built against other system libraries, as in a cache that containers share
        with _locked(stem.with_suffix(".lock")):
            _compile(library, command)
        return ctypes.CDLL(str(library))


def _compile(library: Path, command: list[str]) -> None:
    """Compile aside, then rename: no process ever sees half a library."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        try:
            run = subprocess.run(
                [*command, "-o", str(built)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_COMPILE_SECONDS,
                env=os.environ | {"TMPDIR": folder, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"the compiler {command[0]} does not run ({error})", _INSTALL) from error
        if run.returncode != 0 or not built.is_file():
            said = "\n".join((run.stderr or run.stdout).strip().splitlines()[:_ERROR_LINES])
            raise Unavailable(
                f"{command[0]} fails on {library.stem} with exit status {run.returncode}: {said or 'it says nothing'}",
                _INSTALL,
            )
        digest = Path(folder) / "digest"
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        # If another process's digest comes in between, the library only looks broken and is built once more.
        digest.replace(library.with_suffix(".sha256"))
        built.replace(library)
