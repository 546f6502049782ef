"""Rows of a CSV file that are added one by one, so that a call that was stopped goes on where it was."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionmix.tools import checkpoint


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows that an earlier call wrote, none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    if table.fieldnames and tuple(table.fieldnames) != tuple(columns):
        raise ValueError(f"--csv {path} has other columns than this command writes; give another file")
    return rows


def append_rows(path: Path, new: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to a CSV file, which is at every moment whole; raises as `read_rows` and `checkpoint.write_aside` do."""
    rows = [*read_rows(path, columns), *new]

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)

    checkpoint.write_aside(path, write)


def has_row(rows: Sequence[Mapping[str, str]], row: Mapping[str, Any], key: Sequence[str]) -> bool:
    """Return whether one of the rows agrees with `row` in the columns `key`."""
    return any(all(str(row[column]) == old[column] for column in key) for old in rows)
