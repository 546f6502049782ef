"""Mixers by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MIXERS: dict[str, type[nn.Module]] = {}


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a mixer under `name`.

    Raises:
        ValueError: `name` is taken.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _MIXERS:
            raise ValueError(f"mixer name={name!r} is taken by {_MIXERS[name].__qualname__}; choose another name")
        _MIXERS[name] = cls
        return cls

    return register


def list_mixers() -> list[str]:
    """Return the names that `create_mixer` knows, sorted."""
    return sorted(_MIXERS)


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of the mixer called `name`, by name.

    Raises:
        ValueError: no mixer has this name.
    """
    if name not in _MIXERS:
        raise ValueError(f"unknown mixer name={name!r}{_nearest(name, _MIXERS)}; the mixers are {list_mixers()}")
    parameters = inspect.signature(_MIXERS[name].__init__).parameters
    return {key: value for key, value in parameters.items() if key not in ("self", "dim", "device", "dtype")}


def create_mixer(
    name: str,
    dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Return the mixer called `name`, a module from (batch, height, width, dim) to the same shape.

    Example:
        ``create_mixer("gated_linear_attention", 192, num_heads=3)``

    Args:
        name: One of `list_mixers()`.
        dim: Channels.
        device: Where the parameters lie.
        dtype: Type of the parameters.
        **options: The mixer's own options.

    Raises:
        ValueError: `name` or an option is unknown (the message has the nearest one), or an option's value is refused.
    """
    known = mixer_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"mixer {name!r} has no option {option}={options[option]!r}{_nearest(option, known)}; "
                f"its options are {sorted(known)}"
            )
    return _MIXERS[name](dim, device=device, dtype=dtype, **options)


def _nearest(word: str, words: Any) -> str:
    matches = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
