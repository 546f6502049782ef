"""The tiny models, and which of them the quick suite puts through the whole contract."""

from collections.abc import Mapping
from typing import Any

import pytest

import visionmix
from visionmix.models.family import variant_of

TINY = [name for name in visionmix.models.list_family_models() if name.startswith("test_")]
# Sizes show nothing of a skeleton that other sizes do not; which mixer stands in a block is the mixers' own tests'.
_SIZES = {"img_size", "embed_dim", "embed_dims", "depth", "depths", "num_heads", "mixer"}


def shown(name: str) -> set[tuple[str, str]]:
    """Return what the model called `name` shows: its skeleton with each option that is not left to its default."""
    layout = variant_of(name).layout
    return {(layout.skeleton.__name__, option) for option in {"", *layout.options.keys() - _SIZES}}


def mixers(name: str) -> set[tuple[str, str]]:
    """Return the mixers of the model called `name`, each with its options."""
    found, entries = set(), [variant_of(name).layout.options.get("mixer")]
    while entries:
        entry = entries.pop()
        if isinstance(entry, str):
            found.add((entry, ""))
        elif isinstance(entry, Mapping):
            found |= {(str(entry.get("name")), option) for option in entry}
            entries += entry["cycle"] if "cycle" in entry else [entry["name"]]
        elif isinstance(entry, list | tuple):
            entries += entry
    return found


def covering(shows: Mapping[str, set[Any]]) -> list[str]:
    """Return few of the names in `shows` that show together all that they all show: always the one that adds most."""
    left = set().union(*shows.values())
    chosen = []
    while left:
        best = max(shows, key=lambda name: len(shows[name] & left))  # the first of equal ones
        chosen.append(best)
        left -= shows[best]
    return chosen


# One for every skeleton and option: a family is core by what it shows, no list names it.
CORE = covering({name: shown(name) for name in TINY})

# One for every skeleton and option, and for every mixer and option.
MIXING = covering({name: shown(name) | mixers(name) for name in TINY})

EVERY = pytest.mark.parametrize("name", TINY)
"""Over every tiny model: what the quick suite asks of each family."""


def _quick(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [name if name in names else pytest.param(name, marks=pytest.mark.long) for name in TINY]
    )


WHOLE = _quick(CORE)
"""Over every tiny model, those that are not core in the long sweeps alone."""

EACH_MIXER = _quick(MIXING)
"""Over every tiny model, in the quick suite those that show together every mixer in every kind of skeleton."""
