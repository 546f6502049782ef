"""The figure by which epochs are compared: top-1, or mean average precision where images have several labels."""

from collections.abc import Mapping
from typing import Any

NAMES = {"map": "mAP", "top1": "top-1", "top5": "top-5"}


def score_name(row: Mapping[str, Any]) -> str:
    """Return the name that people read of the figure in a row of summary.csv."""
    return NAMES[_key(row)]


def score(row: Mapping[str, Any]) -> float:
    """Return the figure of a row of summary.csv, in percent."""
    return row[f"test_{_key(row)}"]


def _key(row: Mapping[str, Any]) -> str:
    return next(name for name in NAMES if f"test_{name}" in row)
