"""Rows of predictions as CSV or Parquet: written in parts as they come, joined into one file at the end.

Until then the parts lie in a folder beside the output, from which a call that was killed goes on.
"""

import csv
import importlib.util
import json
import shutil
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from visionmix.tools import checkpoint
from visionmix.tools.arguments import check_out

SUFFIXES = (".csv", ".parquet")


def check_output(output: Path) -> None:
    """Raise ValueError where rows cannot be written to a file of this name."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output} must end in {' or '.join(SUFFIXES)}")
    check_out(output, name="--output")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"--output {output} needs the package pyarrow; install it (pip install 'visionmix[parquet]'), or write .csv"
        )


def columns(topk: int, features: bool) -> list[str]:
    """Return the columns of a row: the picture, why it cannot be read, its guesses, its features."""
    guesses = [name for place in range(1, topk + 1) for name in (f"class_{place}", f"probability_{place}")]
    return ["image", "error", *guesses, *["features"] * features]


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a file, whole or not at all; features are a list in Parquet, and numbers with spaces in CSV."""

    def as_csv(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names, restval="")
            table.writeheader()
            for row in rows:
                features = row.get("features")
                written = {"features": " ".join(map(repr, features))} if isinstance(features, list) else {}
                table.writerow({key: value for key, value in (row | written).items() if value is not None})

    def as_parquet(aside: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {"probability": pyarrow.float32(), "features": pyarrow.list_(pyarrow.float32())}
        schema = pyarrow.schema([(name, kinds.get(name.partition("_")[0], pyarrow.string())) for name in names])
        parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), aside)

    checkpoint.write_aside(path, as_csv if path.suffix == ".csv" else as_parquet)


def read(path: Path, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file, or these columns of them; everything in a CSV file is text."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: row[name] for name in names} if names else row for row in csv.DictReader(file)]
    from pyarrow import parquet

    return parquet.read_table(path, columns=names).to_pylist()


def check_replaced(output: Path, pictures: Collection[str]) -> None:
    """Check that a file at `output` is an earlier result for no other pictures than these, which will replace it.

    Raises:
        ValueError: it is another file, or has rows of other pictures.
    """
    if not output.exists():
        return
    remedy = "give another --output, or remove the file"
    try:
        done = [row["image"] for row in read(output, ["image", "error"])]
    except Exception as error:  # whatever a reader meets in a file of another kind
        raise ValueError(f"--output {output} exists and holds no predictions; {remedy}") from error
    if other := sorted(set(done) - set(pictures)):
        raise ValueError(f"--output {output} has rows of {len(other)} other pictures, e.g. {other[0]}; {remedy}")


class Parts:
    """The rows on their way to `output`.

    Args:
        output: the file in the end, .csv or .parquet.
        names: its columns.
        about: what all parts must have in common, as plain values.

    Raises:
        ValueError: there are parts of another call.
        OSError: the folder cannot be made.
    """

    def __init__(self, output: Path, names: Sequence[str], about: dict[str, Any]) -> None:
        self.output, self.names = output, list(names)
        self.folder = output.with_name(output.name + ".parts")
        noted = self.folder / "about.json"
        about = json.loads(json.dumps(about))
        if noted.is_file():
            try:
                old = dict(json.loads(noted.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{noted} is damaged ({error}); remove the folder {self.folder}") from error
            if other := [key for key in {**old, **about} if old.get(key) != about.get(key)]:
                differences = ", ".join(f"{key}={old.get(key)} there, {about.get(key)} now" for key in other)
                raise ValueError(
                    f"{self.folder} holds the beginning of another call ({differences}); finish that one, remove the "
                    "folder, or give another --output"
                )
        else:
            checkpoint.write_aside(noted, lambda aside: aside.write_text(json.dumps(about) + "\n"))

    def files(self) -> list[Path]:
        """Return the parts that are there."""
        return sorted(self.folder.glob(f"*{self.output.suffix}"))

    def done(self) -> set[str]:
        """Return the pictures that have rows."""
        return {row["image"] for file in self.files() for row in read(file, ["image"])}

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write a part; raises OSError as `checkpoint.write_aside` does."""
        if rows:
            _write(self.folder / f"{uuid.uuid4().hex}{self.output.suffix}", self.names, rows)

    def join(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Write the output, a row for each picture in `order`, remove the parts, and return the rows.

        Raises:
            RuntimeError: a picture has no row.
            OSError: the output cannot be written; the parts are kept.
        """
        rows = {row["image"]: row for file in self.files() for row in read(file)}
        if missing := [name for name in order if name not in rows]:
            raise RuntimeError(f"{len(missing)} pictures have no row in {self.folder}, e.g. {missing[0]}")
        wanted = [rows[name] for name in order]
        _write(self.output, self.names, wanted)
        shutil.rmtree(self.folder)
        return wanted
