"""Packages that only some users need, each of an extra of its own: pip install 'visionmix[EXTRA]'."""

import importlib
from types import ModuleType


def load(name: str, extra: str, user: str) -> ModuleType:
    """Return the module `name`.

    Args:
        name: of the module, and of its package.
        extra: of visionmix, that installs it.
        user: who needs it, in the plural, for the message.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{user} need {name}; run: pip install 'visionmix[{extra}]'") from error
