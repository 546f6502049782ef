"""Strategies of hypothesis that several tests share."""

from hypothesis import strategies as st


def sizes(*most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Return tuples of sizes, each at least 1 and at most as large as `most` says."""
    return st.tuples(*(st.integers(1, size) for size in most))
