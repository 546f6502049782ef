"""Mixers by name."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visionmix.names import check_options, nearest, options_of

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
        raise ValueError(f"unknown mixer name={name!r}{nearest(name, _MIXERS)}; the mixers are {list_mixers()}")
    return options_of(_MIXERS[name].__init__, besides=("self", "dim", "device", "dtype"))


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
    check_options(f"mixer {name!r}", options, mixer_options(name))
    return _MIXERS[name](dim, device=device, dtype=dtype, **options)
