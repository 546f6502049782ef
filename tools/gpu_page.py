"""The rows of a run of `tools/gpu.py`: one CSV file and one page in Markdown, both whole at every moment."""

import csv
import io
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape

Row = dict[str, Any]

MEASURED = (
    "part",
    "subject",
    "what",
    "by",
    "dtype",
    "value",
    "unit",
    "p20",
    "p80",
    "limit",
    "passed",
    "note",
    "second",
)
CONDITIONS = ("date", "device", "driver", "torch", "triton", "python", "commit")
COLUMNS = MEASURED + CONDITIONS
_BEST = 3  # of a kernel's settings in a sweep


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader, or a stop, finds the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = list(head)
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    lines += [" | ".join(_text(cell).replace("|", "/") for cell in row) for row in rows]
    return [f"| {line} |" for line in lines] + [""]


class Report:
    """Collects rows and writes them after each.

    Args:
        folder: Holds gpu.csv, to which rows of this run are added, and gpu.md, which shows this run alone.
        command: How the run was called.
        say: Prints a line.
    """

    def __init__(self, folder: Path, command: str, say: Callable[[str], None]):
        self.csv, self.page = folder / "gpu.csv", folder / "gpu.md"
        self.command, self.say = command, say
        self.rows: list[Row] = []
        self.conditions: Row = {}
        self._lock = threading.Lock()
        self._former = self.csv.read_text() if self.csv.exists() else ",".join(COLUMNS) + "\n"
        if (found := self._former.partition("\n")[0].strip()) != ",".join(COLUMNS):
            raise ValueError(f"{self.csv} has the columns {found}; move it aside, or give another folder by --out")

    def add(self, row: Row) -> None:
        """Add a row and write both files."""
        with self._lock:
            self.rows.append(row)
            written = io.StringIO(newline="")
            writer = csv.DictWriter(written, COLUMNS, extrasaction="ignore", lineterminator="\n")
            for each in self.rows:
                writer.writerow({key: _text(value) for key, value in (self.conditions | each).items()})
            write_whole(self.csv, self._former + written.getvalue())
            write_whole(self.page, "\n".join(self.lines()))
        figures = " ".join(filter(None, (_text(row.get("value")), row.get("unit", "") if "value" in row else "")))
        words = [row["part"], row.get("subject"), row.get("dtype"), row.get("what"), row.get("by"), figures]
        words += ["FAILED" if row.get("passed") is False else "", row.get("note")]
        self.say(escape("  ".join(_text(word) for word in words if word)))

    @property
    def wrong(self) -> list[Row]:
        """The checks of correctness that failed or could not be made."""
        return [row for row in self._of("correctness") if row.get("passed") is False]

    def _of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == part]

    def lines(self) -> list[str]:
        """Return the page's lines, what matters most first."""
        known = self.conditions
        lines = [
            f"# visionmix on {known.get('device', 'an unknown device')}",
            "",
            f"`{self.command}`, {known.get('date')}, commit {known.get('commit')}, driver {known.get('driver')}, torch "
            f"{known.get('torch')}, triton {known.get('triton')}, Python {known.get('python')}.",
            "",
        ]
        machine = [f"{r['subject']} {_text(r['value'])} {r['unit']}" for r in self._of("machine") if "value" in r]
        lines += [f"The card: {', '.join(machine)}.", ""] if machine else []
        if known.get("driver") == "none":
            lines += ["There was no GPU: kernels were interpreted, nothing was timed.", ""]
        checked = [row for row in self._of("correctness") if "value" in row]
        if checked:
            passed = sum(row["passed"] for row in checked)
            lines += [f"{passed} of {len(checked)} results lie within their tolerances and repeat bit by bit.", ""]
        for part in (
            self._ops,
            self._models,
            self._correctness,
            self._kernels,
            self._profiles,
            self._sweep,
            self._failed,
        ):
            lines += part()
        return lines

    def _ops(self) -> list[str]:
        rows = [row for row in self._of("ops") if row["by"] != "kernel" and row.get("passed") is not False]
        ours = {(row["subject"], row["what"]): row for row in rows if row["by"] == "visionmix"}
        cells = []
        for row in rows:
            first = ours.get((row["subject"], row["what"]), {})
            time, base, floor = row.get("value"), first.get("value"), first.get("limit")
            cells.append([
                row["subject"], row["what"], row["by"], time, _spread(row), time / base if time and base else "",
                floor, time / floor if time and floor else "", row.get("note"),
            ])  # fmt: skip
        head = ("op", "pass", "by", "median, ms", "20th to 80th", "times ours", "floor, ms", "times the floor", "")
        return ["## Ops beside their peers", "", *_table(head, cells)] if cells else []

    def _models(self) -> list[str]:
        found: dict[tuple, Row] = defaultdict(dict)
        for row in self._of("models"):
            if row.get("passed") is not False and not row["unit"].startswith("%"):
                found[row["what"], row["by"], row["subject"]][row["unit"]] = row
        cells = []
        for (what, by, model), units in found.items():
            rate, memory, cost = (units.get(unit, {}) for unit in ("images/s", "MB", "GMAC/s"))
            cells.append([what, by, model, rate.get("value"), _spread(rate), cost.get("value"), memory.get("value")])
        head = ("pass", "by", "model", "images/s", "20th to 80th", "GMACs a second", "peak MB")
        return ["## Models", "", *_table(head, sorted(cells, key=lambda cell: cell[:2]))] if cells else []

    def _correctness(self) -> list[str]:
        found = defaultdict(list)
        for row in self._of("correctness"):
            if "value" in row:
                found[row["subject"].partition(" ")[0], row["dtype"]].append(row)
        cells = []
        for (op, dtype), rows in sorted(found.items()):
            # NaN is the worst.
            worst = max(rows, key=lambda r: r["value"] / r["limit"] if r["value"] == r["value"] else float("inf"))
            where = f"{worst['what']}, {worst['subject'].partition(' ')[2]}"
            cells.append(
                [op, dtype, f"{sum(r['passed'] for r in rows)} of {len(rows)}", worst["value"], worst["limit"], where]
            )
        head = ("op", "dtype", "passed", "worst error", "tolerance", "where")
        return ["## Correctness", "", *_table(head, cells)] if cells else []

    def _kernels(self) -> list[str]:
        cells = [
            [row["subject"], row["what"], row.get("value"), _spread(row), row["note"]]
            for row in self._of("ops")
            if row["by"] == "kernel"
        ]
        return ["## Our kernels", "", *_table(("op", "kernel", "ms", "20th to 80th", ""), cells)] if cells else []

    def _profiles(self) -> list[str]:
        rows = [row for row in self._of("models") if row.get("unit", "").startswith("%")]
        cells = [[r["subject"], r["what"], f"`{r['by']}`", r.get("value"), r.get("note")] for r in rows]
        head = ("model", "pass", "kernel", "% of the time", "a pass")
        return ["## Where models spend their time", "", *_table(head, cells)] if cells else []

    def _sweep(self) -> list[str]:
        found = defaultdict(list)
        for row in self._of("sweep"):
            if row.get("value"):
                found[row["subject"], row["what"]].append(row)
        cells = []
        for (subject, kernel), rows in found.items():
            rows = sorted(rows, key=lambda row: row["value"])
            best = "; ".join(f"{row['by']}: {_text(row['value'])}" for row in rows[:_BEST])
            default = next((row["value"] for row in rows if row.get("note") == "the default"), None)
            cells.append([subject, kernel, default, best])
        head = ("op", "kernel", "default, ms", "fastest, ms")
        return ["## Sweep of warps, stages and tiles", "", *_table(head, cells)] if cells else []

    def _failed(self) -> list[str]:
        rows = [
            row for row in self.rows if row.get("passed") is False and not (row["part"] == "sweep" and row.get("by"))
        ]
        cells = [
            [
                row["part"],
                row.get("subject"),
                row.get("dtype"),
                row.get("what"),
                row.get("by"),
                row.get("value"),
                row["note"],
            ]
            for row in rows
        ]
        head = ("part", "of", "dtype", "what", "by", "value", "why")
        return ["## What failed, is missing or was left out", "", *_table(head, cells)] if cells else []


def _spread(row: Row) -> str:
    return f"{_text(row['p20'])} to {_text(row['p80'])}" if row.get("p20") else ""
