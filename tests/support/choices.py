"""The ways in which an op's PyTorch reference and its fast implementation can come to run."""

from contextlib import AbstractContextManager
from unittest import mock

import pytest

from visionmix.kernels import dispatch, use

CHOICES = ("auto", "op", "reference")
EACH_CHOICE = pytest.mark.parametrize("choice", CHOICES)


def choose(choice: str) -> AbstractContextManager:
    """Return a context: `use(choice)`, or, for "op", the reference inside the registered op, with its own backward."""
    return mock.patch.object(dispatch, "_FAST", {}) if choice == "op" else use(choice)
