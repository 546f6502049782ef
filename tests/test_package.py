"""The package as it is installed: its files, its imports, its public names."""

import json
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
    import os

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


def test_the_wheel_holds_the_tree(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    source = tmp_path / "source"
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    for name in [*ROOMS, "pyproject.toml", "README.md", "LICENSE"]:
        # A copy, so that no build folder appears in the tree.
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in file.namelist() if name.endswith("entry_points.txt"))
        assert "visionmix = visionmix.tools.main:main" in file.read(metadata).decode()
    assert held == tree()
    assert "visionmix/py.typed" in held


@pytest.mark.parametrize("room", ["kernels", "scans"])
def test_rooms_refuse_to_be_imported_from_the_tree(room):
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\ntry: import {room}\nexcept ImportError as error: print(error)"
    )
    assert f"visionmix.{room}" in run(code)


def test_import_is_quiet_and_adds_no_triton():
    code = """
import sys, timm
before = {name for name in sys.modules if name.startswith("triton")}
import visionmix
print({name for name in sys.modules if name.startswith("triton")} - before)
"""
    assert run(code) == "set()\n"


def test_import_is_cheap():
    code = "import timm, time; start = time.perf_counter(); import visionmix; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) <= 0.3


BLOCKED = """
import sys
sys.modules["triton"] = None  # every import of it now fails
import torch, timm, visionmix
model = timm.create_model("test_vig")
model(torch.randn(1, 3, 64, 96)).sum().backward()
backends = visionmix.kernels.backends()
assert backends["gated_linear_attention"]["reference"] == "ready"
assert backends["gated_linear_attention"]["triton"] != "ready"
print("ran")
"""


def test_without_triton():
    assert run(BLOCKED) == "ran\n"


def test_without_a_compiler(tmp_path):
    code = """
import torch, timm, visionmix, logging
logging.disable()
model = timm.create_model("test_vig")
model(torch.randn(1, 3, 64, 96)).sum().backward()
print(visionmix.kernels.backends()["gated_linear_attention"]["cpu"])
"""
    assert run(code, PATH=str(tmp_path), CXX="", VISIONMIX_CACHE=str(tmp_path)) != "ready\n"


def test_public_names_are_these():
    """Whoever adds or removes a public name changes this list, and says so in CHANGELOG.md."""
    names = {
        "visionmix": visionmix,
        "visionmix.kernels": visionmix.kernels,
        "visionmix.models": visionmix.models,
        "visionmix.scans": visionmix.scans,
    }
    public = {name: sorted(module.__all__) for name, module in names.items()}
    public["models"] = sorted(visionmix.models.list_family_models())
    public["mixers"] = visionmix.list_mixers()
    assert public == json.loads((ROOT / "tests" / "public_names.json").read_text())
    for name, module in names.items():
        assert all(hasattr(module, each) for each in public[name])
