"""The figure by which epochs are compared: top-1, mean average precision of several labels, the loss without labels."""

from collections.abc import Mapping
from typing import Any

NAMES = {"map": "mAP", "top1": "top-1", "top5": "top-5"}


def score_name(row: Mapping[str, Any]) -> str:
    """Return the name that people read of the figure in a row of summary.csv; "loss" where there are no labels."""
    return NAMES.get(_key(row), "loss")


def score(row: Mapping[str, Any]) -> float:
    """Return the figure of a row of summary.csv, the greater the better: in percent, or the loss with a minus."""
    key = _key(row)
    return row[f"test_{key}"] if key else -row["test_loss"]


def score_text(row: Mapping[str, Any]) -> str:
    """Return the figure of a row of summary.csv with its unit."""
    return f"{score(row):6.2f} %" if _key(row) else f"{row['test_loss']:.3f}"


def _key(row: Mapping[str, Any]) -> str | None:
    return next((name for name in NAMES if f"test_{name}" in row), None)
