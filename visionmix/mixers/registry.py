"""Mixers by name."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visionmix.registry import Registry, factory_kwargs, is_int, out_of_range

_MIXERS: Registry[nn.Module] = Registry("mixer", besides=("dim", "device", "dtype"))


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a mixer under `name`.

    Raises:
        ValueError: `name` is taken.
    """
    return _MIXERS.register(name)


def list_mixers() -> list[str]:
    """Return the names that `create_mixer` knows, sorted."""
    return _MIXERS.names()


def mixer_named(name: str) -> type[nn.Module]:
    """Return the class of the mixer called `name`.

    Raises:
        ValueError: no mixer has this name.
    """
    return _MIXERS.named(name)


def mixer_class(class_name: str) -> type[nn.Module] | None:
    """Return the registered mixer whose class is called `class_name`, or None."""
    return _MIXERS.class_called(class_name)


def is_mixer(module: nn.Module) -> bool:
    """Return whether `module` is of a registered class."""
    return isinstance(module, _MIXERS.classes())


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of the mixer called `name`, by name.

    Raises:
        ValueError: no mixer has this name.
    """
    return _MIXERS.options(name)


def create_mixer(
    name: str, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
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
        TypeError: `dim` or an option is of another kind than it should be.
        ValueError: `name` or an option is unknown (the message has the nearest one), or a value is refused.
    """
    if not is_int(dim):
        raise TypeError(f"dim={dim!r} is a {type(dim).__name__}; give a number of channels")
    if dim < 1:
        raise ValueError(f"dim={dim} is too small; give 1 channel or more")
    placed = factory_kwargs(device, dtype)
    mixer = _MIXERS.checked(name, options)
    _MIXERS.check_kinds(name, options)
    found = out_of_range(options)
    try:
        made = mixer(dim, **placed, **options)
    except Exception as error:
        if found is None or f"{found[0]}=" in str(error):  # in the mixer's own words
            raise
        raise ValueError(f"mixer {name!r}: {found[1]}") from error
    if found is not None:
        raise ValueError(f"mixer {name!r}: {found[1]}")
    return made
