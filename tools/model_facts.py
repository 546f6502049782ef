"""Facts of the families, from their tables, the golden files and the measured rows of a clone."""

import csv
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from visionmix.models.family import family_of, list_family_models, published, variant_of, weights_of
from visionmix.tools.checkpoint import write_aside

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
COSTS = ROOT / "benchmarks" / "costs.csv"
MEASURED = ROOT / "benchmarks" / "models.csv"
_NO_WEIGHTS = "no weights"
_COST_COLUMNS = ("model", "params_m", "gmacs", "ops")


@dataclass(frozen=True)
class Counted:
    """What `tools/info.py` counted of a model and tag: a row of benchmarks/costs.csv.

    Attributes:
        params_m: Parameters in millions.
        gmacs: Multiply-adds of an image of the built size, in thousands of millions.
        ops: The ops of this library that a forward pass calls, with spaces between them.
    """

    params_m: str
    gmacs: str
    ops: str


@dataclass(frozen=True)
class Comparison:
    """Where a model's outputs were compared with those of the published code.

    Attributes:
        height, width: Of the image.
        depths: Blocks a stage, where the model was compared with fewer than it has.
        repository: Of the published code, ``owner/name`` on GitHub, with remarks.
        commit: Of the repository, or empty.
        entry: What builds the model there.
    """

    height: int
    width: int
    depths: str
    repository: str
    commit: str
    entry: str


def families() -> dict[str, list[str]]:
    """Return the names of every family's published models by the family's module, in the order of registration."""
    names: dict[str, list[str]] = {}
    for name in list_family_models():
        if not name.startswith("test_"):
            names.setdefault(family_of(name).module, []).append(name)
    return names


def tagged(name: str) -> list[str]:
    """Return the model's name with each tag that it has weights of, or alone where it has none."""
    return [f"{name}.{tag}" for tag in variant_of(name).weights] or [name]


def family_title(module: str) -> tuple[str, str]:
    """Return the family's name and what mixes its tokens, from the first line of its module's docstring."""
    title = (sys.modules[module].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    family, _, about = title.partition(": ")
    return family, about


def family_text(module: str) -> str:
    """Return what the docstring of the family's module says below its first line."""
    return (sys.modules[module].__doc__ or "").strip().partition("\n")[2].strip()


def licence(name: str) -> str:
    """Return the licence of the weights of the model or tag called `name`, or "no weights" where none are known."""
    return published(name).license if weights_of(name).address else _NO_WEIGHTS


def licences(names: Sequence[str]) -> str:
    """Return the licences of the weights of the models called `names`, or "no weights" where none are known."""
    found = {licence(tag) for name in names for tag in tagged(name)}
    return ", ".join(sorted(found - {_NO_WEIGHTS})) or _NO_WEIGHTS


def best_top1(names: Sequence[str]) -> float | None:
    """Return the best published top-1 of the models called `names`, or None."""
    facts = [published(tag).top1 for name in names for tag in tagged(name)]
    return max((top1 for top1 in facts if top1 is not None), default=None)


def read_costs(path: Path = COSTS) -> dict[str, Counted]:
    """Return what was counted, by model and tag.

    Raises:
        ValueError: `path` has other columns.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != _COST_COLUMNS:
            raise ValueError(f"{path} has the columns {rows.fieldnames}; `python tools/info.py --write` writes it anew")
        return {row["model"]: Counted(row["params_m"], row["gmacs"], row["ops"]) for row in rows}


def write_costs(count: Callable[[str], Counted], path: Path = COSTS) -> None:
    """Write what `count` gives for every model and tag to `path`."""
    lines = [",".join(_COST_COLUMNS)]
    for tag in [tag for names in families().values() for name in names for tag in tagged(name)]:
        cost = count(tag)
        lines.append(f"{tag},{cost.params_m},{cost.gmacs},{cost.ops}")
    write_text(path, "\n".join(lines) + "\n")


def comparisons(name: str) -> list[Comparison]:
    """Return the comparisons of the model called `name` with its published code, as the golden files state them."""
    found = []
    for path in sorted(GOLDENS.glob(f"{name}*.npz")):
        if path.stem.partition("__")[0] == name:
            with np.load(path) as file:
                meta = json.loads(str(file["meta"]))
            depths = path.stem.partition("__depths")[2] and ", ".join(map(str, meta["kwargs"].get("depths", ())))
            repository = meta["repo"].removeprefix("github.com/")
            commit = meta.get("commit", "")
            found.append(Comparison(*meta["image_size"], depths, repository, commit, meta["entry"]))
    return found


def measured(names: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of benchmarks/models.csv that time one of the models called `names`, oldest first."""
    with MEASURED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"].partition("+")[0] in names]
    return sorted(rows, key=_place)


def _place(row: dict[str, str]) -> tuple[str | int, ...]:
    sizes = (int(row[key]) for key in ("img_size", "batch", "threads"))
    return row["model"], row["pass"], *sizes, row["device"], row["date"]


def option_text(value: Any) -> str:
    """Return an option's value as it would be typed; of a function or class, its name."""
    text = _typed(value)
    return f"`{text}`" if text else ""


def _typed(value: Any) -> str:
    if isinstance(value, functools.partial):
        keywords = ", ".join(f"{key}={_typed(each)}" for key, each in value.keywords.items())
        return f"{_typed(value.func)}({keywords})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_typed(key)}: {_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        items = [_typed(each) for each in value]
        runs = [(item, len(list(run))) for item, run in groupby(items)]
        if len(items) > 6 and len(runs) == 1:
            return f"{items[0]}, {len(items)} times"
        inside = ", ".join(items)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, str):
        return json.dumps(value)
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return name.rpartition("<locals>.")[2].lstrip("_")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    write_aside(path, lambda aside: aside.write_text(text) and None)
