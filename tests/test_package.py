"""The package as it is installed: its files, its imports, its public names."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import visionmix

ROOT = Path(__file__).parent.parent
ROOMS = {"visionmix": "visionmix", "kernels": "visionmix/kernels", "scans": "visionmix/scans"}
ROOMS |= {"configs": "visionmix/configs", "tools": "visionmix/tools"}


def run(code: str, **environment) -> str:
    """Return what `code` prints in a fresh interpreter, away from the tree; fail if it prints to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def tree() -> set[str]:
    """Return the rooms' files as the wheel should have them; shell scripts are for a clone."""
    names = set()
    for room, package in ROOMS.items():
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".sh", ".pyc"):
                names.add(f"{package}/{path.relative_to(ROOT / room).as_posix()}")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tree, so that no build folder appears in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_tree(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in file.namelist() if name.endswith("entry_points.txt"))
        assert "visionmix = visionmix.tools.main:main" in file.read(metadata).decode()
    assert held == tree()
    assert "visionmix/py.typed" in held


SURFACE = """
import torch
import visionmix
from visionmix import create_mixer, kernels, list_mixers, reduction, scans

names: list[str] = list_mixers()
mixer: torch.nn.Module = create_mixer("gated_linear_attention", 24, num_heads=3)
index: torch.Tensor = scans.order("hilbert", height=3, width=4).index
claimed: float | None = visionmix.models.published("vig_s").top1
q = torch.randn(1, 4, 2, 8)
with kernels.use("reference"):
    out, state = kernels.gated_linear_attention(q, q, q, -q.abs())
out.sum()
merge, unmerge = reduction.match(torch.randn(1, 9, 4), 2)
left: torch.Tensor = merge(torch.randn(1, 9, 4))
"""


@pytest.mark.long
def test_the_wheels_public_surface_type_checks(wheel, tmp_path):
    """In an editable install type checkers do not see the mapped folders, so the wheel is unpacked."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (tmp_path / "surface.py").write_text(SURFACE)
    (tmp_path / "wrong.py").write_text(SURFACE + "names.absent()\nscans.order('hilbert', 'three', 4)\n")

    def check(name: str) -> str:
        command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", name]
        environment = {**os.environ, "MYPYPATH": str(tmp_path / "site")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "Success" in check("surface.py")
    wrong = check("wrong.py")
    assert "absent" in wrong
    assert "incompatible type" in wrong


@pytest.mark.parametrize("room", ["kernels", "scans"])
def test_rooms_refuse_to_be_imported_from_the_tree(room):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
try: from {room} import order, na2d
except ImportError as error: print(error)
"""
    assert f"import this as visionmix.{room}" in run(code)


def test_a_clone_serves_python_that_is_started_in_it():
    """There the clone's folder comes before what is installed, and holds the packages in other places than a wheel."""
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {str(ROOT)!r})
import timm, visionmix, visionmix.tools.arguments
print(visionmix.kernels.__file__, visionmix.scans.names()[0], timm.is_model("vig_t"))
"""
    assert run(code).split() == [str(ROOT / "kernels" / "__init__.py"), "atrous", "True"]


def test_the_folder_of_kernels_passes_for_no_version_of_the_package_of_this_name():
    """transformers imports whatever bears the name, in a clone's root this folder, and reads its version."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels; print(getattr(kernels, '__version__', None))"
    )
    assert run(code).strip() == "None"


def test_import_is_quiet_cheap_and_adds_no_triton():
    # Seconds of the processor; a busy machine makes them more, never fewer, so that the import is tried again, each
    # time in a child of a process that has timm. The first one writes the bytecode that pip writes when it installs.
    # On slow machines, where five million passes of an empty loop take over 0.15 s, the limit is twice theirs.
    code = """
import os, sys, time, timm, warnings
before = {name for name in sys.modules if name.startswith("triton")}
for _ in range(8):
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, none of which runs
        child = os.fork()
    if not child:
        start = time.process_time()
        for _ in range(5_000_000):
            pass
        limit = max(0.3, 2 * (time.process_time() - start))
        start = time.process_time()
        import visionmix
        seconds = time.process_time() - start
        added = {name for name in sys.modules if name.startswith("triton")} - before
        os.write(write, f"{seconds} {limit} {added}".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(read, 10_000).decode()
    print(said)
    if float(said.split()[0]) <= float(said.split()[1]):
        break
"""
    lines = [line.split(maxsplit=2) for line in run(code, PYTHONDONTWRITEBYTECODE="").splitlines()]
    assert {added for *_, added in lines} == {"set()"}
    assert float(lines[-1][0]) <= float(lines[-1][1])


def test_public_names_are_these():
    """Whoever adds or removes a public name changes this list, and says so in CHANGELOG.md; a family adds none."""
    names = {
        "visionmix": visionmix,
        "visionmix.adaptive": visionmix.adaptive,
        "visionmix.kernels": visionmix.kernels,
        "visionmix.mixers": visionmix.mixers,
        "visionmix.models": visionmix.models,
        "visionmix.reduction": visionmix.reduction,
        "visionmix.scans": visionmix.scans,
    }
    public = {name: sorted(module.__all__) for name, module in names.items()}
    assert public == json.loads((ROOT / "tests" / "public_names.json").read_text())
    for name, module in names.items():
        assert all(hasattr(module, each) for each in public[name])
