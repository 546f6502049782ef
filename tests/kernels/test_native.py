"""Compiling at first use: the cache, the lock, and every way in which it can fail."""

import ctypes
import importlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from visionmix import kernels
from visionmix.kernels import dispatch, native
from visionmix.kernels.dispatch import Unavailable

_CHOSEN = os.environ.get("CXX")
COMPILER = next(filter(None, map(shutil.which, [_CHOSEN] if _CHOSEN else ["c++", "g++", "clang++"])), None)

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="kernels are not compiled on Windows"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small kernel with a header, a cache of its own, and a compiler that notes each of its runs in `log`."""
    (tmp_path / "factor.h").write_text("constexpr int factor = 2;\n")
    path = tmp_path / "scale.cpp"
    path.write_text('#include "factor.h"\nextern "C" int scale(int x) { return factor * x; }\n')
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {tmp_path}/log\nexec {COMPILER} "$@"\n', encoding="utf-8"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return path


def load(source: Path) -> ctypes.CDLL:
    """Load as a process does that has not loaded it yet."""
    return native.load.__wrapped__(source)


def load_elsewhere(source: Path) -> None:
    """Load in another process: this one's loader would keep the library's name."""
    process = multiprocessing.get_context("fork").Process(target=load, args=(source,))
    process.start()
    process.join()
    assert process.exitcode == 0


def compilations(source: Path) -> int:
    log = source.with_name("log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def cached(source: Path) -> Path:
    (library,) = source.with_name("cache").glob("*.so")
    return library


def test_compiles_once(source):
    assert load(source).scale(21) == 42
    assert load(source).scale(4) == 8
    assert compilations(source) == 1
    assert not list(source.with_name("cache").glob("build-*"))


def test_a_change_of_source_header_flags_or_cpu_compiles_anew(source, monkeypatch):
    load(source)
    source.with_name("factor.h").write_text("constexpr int factor = 3;\n")
    assert load(source).scale(2) == 6
    source.write_text(source.read_text().replace("* x", "* x + 1"))
    assert load(source).scale(2) == 7
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    load(source)
    monkeypatch.setattr(native, "_cpu", lambda: "another CPU")
    load(source)
    assert compilations(source) == 5


def test_processes_that_start_together_compile_once(source):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(8), context.Queue()

    def work():
        barrier.wait()
        answers.put(load(source).scale(5))

    processes = [context.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == [10] * 8
    for process in processes:
        process.join()
    assert compilations(source) == 1


def cut_short(library: Path) -> None:
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])


def garbage_with_a_valid_digest(library: Path) -> None:
    library.write_bytes(b"not a library")
    digest = native.hashlib.sha256(b"not a library").hexdigest()
    library.with_suffix(".sha256").write_text(digest)


def killed_while_compiling(library: Path) -> None:
    library.unlink()
    (library.parent / "build-killed").mkdir()
    (library.parent / "build-killed" / library.name).write_bytes(b"half")


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        garbage_with_a_valid_digest,
        killed_while_compiling,
        lambda library: library.with_suffix(".sha256").unlink(),
        lambda library: library.with_suffix(".sha256").write_bytes(b"\xff\xfe"),
    ],
    ids=["cut short", "garbage", "killed", "no digest", "bad digest"],
)
def test_a_broken_cache_entry_is_built_again(source, damage):
    load_elsewhere(source)
    damage(cached(source))
    assert load(source).scale(21) == 42
    assert compilations(source) == 2
    load(source)
    assert compilations(source) == 2


def test_no_compiler(source, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(source.parent / "empty"))
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler is found.*; install g\+\+ or clang, or set CXX"):
        load(source)


@pytest.mark.parametrize("chosen", ["nowhere-to-be-found", "   "])
def test_a_compiler_that_is_not_there(source, monkeypatch, chosen):
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(Unavailable, match=rf"CXX='{chosen}' is not found"):
        load(source)


def test_a_compiler_with_arguments_of_its_own(source, monkeypatch):
    monkeypatch.setenv("CXX", f"{COMPILER} -DUNUSED")
    assert load(source).scale(1) == 2


def test_a_failing_compiler_is_quoted(source):
    source.write_text("#error the tape is full\n")
    with pytest.raises(Unavailable, match=r"(?s)fails on .*-scale-.* with exit status 1: .*tape is full.*set CXX"):
        load(source)
    assert not list(source.with_name("cache").glob("*.so"))


def test_a_compiler_that_writes_nothing(source, monkeypatch):
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(Unavailable, match=r"true fails on .* with exit status 0: it says nothing; install"):
        load(source)


def test_an_unwritable_cache_is_replaced_by_a_private_folder(source, monkeypatch, caplog):
    monkeypatch.setenv(native.CACHE_VARIABLE, str(source / "below a file"))
    with caplog.at_level(logging.WARNING, logger="visionmix.kernels"):
        assert load(source).scale(3) == 6
    assert f"set {native.CACHE_VARIABLE}" in caplog.text
    folder = source.parent / f"visionmix-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    load(source)
    assert compilations(source) == 1


def test_a_folder_that_others_can_write_is_not_trusted(source, monkeypatch):
    monkeypatch.setenv(native.CACHE_VARIABLE, str(source / "below a file"))
    folder = source.parent / f"visionmix-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(Unavailable, match=r"is not a folder of this user alone.*set VISIONMIX_CACHE to a writable"):
        load(source)
    assert compilations(source) == 0


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(native.CACHE_VARIABLE, "~/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert native.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv(native.CACHE_VARIABLE)
    assert native.cache_folder() == tmp_path / "caches" / "visionmix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = native.cache_folder()
    assert folder in (tmp_path / ".cache" / "visionmix", tmp_path / "Library" / "Caches" / "visionmix")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home(source, monkeypatch, caplog):
    monkeypatch.delenv(native.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user is known
    with caplog.at_level(logging.WARNING, logger="visionmix.kernels"):
        assert load(source).scale(3) == 6
    assert "no home folder" in caplog.text


EXP = """
#include "{header}"
extern "C" void exponential(const float* x, float* y, long size) {{
  for (long i = 0; i < size; i += simd::lanes) simd::store(y + i, simd::exp(simd::load(x + i)));
}}
"""


def exponential(source: Path, x: torch.Tensor) -> torch.Tensor:
    source.write_text(EXP.format(header=Path(native.__file__).with_name("simd.h")))
    y = torch.empty_like(x)
    load(source).exponential(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(x)))
    return y


def test_exp_is_exact_to_1e_7(source):
    x = torch.cat([torch.linspace(-87.3, 88.7, 1 << 18), -torch.logspace(-8, 1.9, 1 << 18)])
    expected = x.double().exp()
    assert ((exponential(source, x).double() - expected) / expected).abs().max() < 1e-7


def test_exp_of_special_values(source):
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, -inf, inf, float("nan"), -1e3, 1e3, -104.0, -103.0, -90.0, 89.0, 1e-30, 1, 2, 3, 4])
    y, expected = exponential(source, x), x.exp()
    assert torch.equal(y[:4], expected[:4])
    assert y[4].isnan()
    torch.testing.assert_close(y[5:], expected[5:], rtol=1e-6, atol=2e-45)
    assert y[9] > 0  # denormal


def run(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def process():
    """What a fresh process with two threads sees before and after its first call of a compiled kernel."""
    code = """
import json, os, torch
from pathlib import Path
from torch.utils.data import DataLoader
from visionmix.kernels import gated_linear_attention, native, use

use("cpu")
q = torch.randn(2, 400, 4, 32)  # large enough for two threads
g = -q.abs()  # not in the workers: torch's own operators hang in a forked child that runs them on two threads

def call():
    return gated_linear_attention(q, q, q, g)[0]

def mapped():
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.exists() else ()
    return sorted({Path(path).name for path in paths})

class Workers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        threads, out = native.threads(), call()
        torch.set_num_threads(1)
        return threads, torch.equal(out, expected)

before = mapped()
expected = call()
after = mapped()
print(json.dumps(dict(
    before=before,
    after=after,
    threads=native.threads(),
    denormal=(torch.tensor([1e-40]) * 0.5).item(),
    double_denormal=5e-324 * len(after or "x") ** 0,
    workers=[
        (threads.item(), equal.item())
        for threads, equal in DataLoader(Workers(), num_workers=2, multiprocessing_context="fork", timeout=60)
    ],
)))
"""
    return json.loads(run(code))


def test_loading_keeps_denormals(process):
    assert process["denormal"] > 0
    assert process["double_denormal"] > 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_shares_the_openmp_runtime_of_torch(process):
    def runtimes(names):
        return [name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))]

    assert any(name.startswith("gated_linear_attention-cpu-") for name in process["after"])
    assert runtimes(process["after"]) == runtimes(process["before"])


def test_a_forked_child_runs_one_thread_and_does_not_hang(process):
    assert process["threads"] == 2
    assert process["workers"] == [[1, True]] * 4


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert native.threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def forgotten():
    """Lets the process forget, before and after, which libraries it has loaded and what it has said."""
    library = importlib.import_module("visionmix.kernels.gated_linear_attention.cpu")._library
    caches = (library, native.load, dispatch._load, dispatch.log_slow_path)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_so_once(forgotten, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    q = torch.randn(1, 9, 1, 4, requires_grad=True)
    with caplog.at_level(logging.WARNING, logger="visionmix.kernels"):
        for _ in range(3):
            kernels.gated_linear_attention(q, q, q, -q.abs())[0].sum().backward()
    assert "no C++ compiler" in kernels.backends()["gated_linear_attention"]["cpu"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("gated_linear_attention runs its PyTorch reference: no C++ compiler is found")
    assert "install g++ or clang, or set CXX" in said


def test_backends_are_ready():
    assert kernels.backends()["gated_linear_attention"]["cpu"] == "ready"


class _Pair(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64 * 2), ("first", ctypes.c_int64)]


STRUCTURE = """
#include <cstdint>
extern "C" {
// Comments, and functions; are no fields.
struct Pair {
  float* data;
  std::int64_t rows[2], first;  // the last one
  float* at(std::int64_t i) const { return data + i; }
};
std::int64_t size_of_Pair() { return sizeof(Pair); }
}
"""


def test_structures_alike_in_python_and_cpp_are_taken(source):
    source.write_text(STRUCTURE)
    assert native.load.__wrapped__(source, _Pair).size_of_Pair() == ctypes.sizeof(_Pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows[2], first;", "rows[2], first, more;"), r"32 bytes in cpu.py and 40 in C\+\+: nothing stands .* more;"),
        (("rows[2], first;", "rows[2];"), r"32 bytes in cpu.py and 24 in C\+\+: first stands where C\+\+ has nothing;"),
        (("rows[2], first;", "first, rows[2];"), r"rows stands where C\+\+ has first"),
        (("rows[2]", "rows[3]"), r"32 bytes in cpu.py and 40 in C\+\+: change both alike"),
        (("first;", "first; float a;"), r"32 bytes in cpu.py and 40 in C\+\+: nothing stands where C\+\+ has a"),
        (("Pair", "Other"), r"has no structure Pair; the one in cpu.py must have the same name"),
    ],
    ids=["more", "fewer", "swapped", "longer", "shorter type", "renamed"],
)
def test_structure_that_differs_is_refused(source, change, message):
    source.write_text(STRUCTURE.replace(*change))
    with pytest.raises(RuntimeError, match=message):
        native.load.__wrapped__(source, _Pair)


@pytest.mark.parametrize("op", [path.parent.name for path in Path(kernels.__file__).parent.glob("*/cpu.py")])
def test_field_added_in_python_alone_is_refused(op, monkeypatch):
    """Every op's structures are compared when its library is loaded."""
    module = importlib.import_module(f"visionmix.kernels.{op}.cpu")
    names = [name for name, x in vars(module).items() if isinstance(x, type) and issubclass(x, ctypes.Structure)]
    assert names
    for name in names:
        structure = getattr(module, name)
        module._library.__wrapped__()
        longer = type(name, (ctypes.Structure,), {"_fields_": [*structure._fields_, ("more", ctypes.c_int64)]})
        with monkeypatch.context() as patch:
            patch.setattr(module, name, longer)
            with pytest.raises(RuntimeError, match=r"more stands where C\+\+ has nothing"):
                module._library.__wrapped__()
