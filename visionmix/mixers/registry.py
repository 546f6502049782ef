"""Mixers by name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visionmix.registry import Registry, factory_kwargs, is_int, out_of_range

_MIXERS: Registry[nn.Module] = Registry("mixer", besides=("dim", "device", "dtype"))


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a mixer under `name` and has its constructor check what it is given.

    Raises:
        ValueError: `name` is taken.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        _MIXERS.register(name)(cls)
        build = cls.__init__  # type: ignore[misc]
        positional = list(inspect.signature(build).parameters)[1:]

        @functools.wraps(build)
        def checked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            found = None
            if type(self) is cls:  # a class derived from it passes on what it has checked
                found = _check(name, **dict(zip(positional, args, strict=False)) | kwargs)
            try:
                build(self, *args, **kwargs)
            except Exception as error:
                if found is None or f"{found[0]}=" in str(error):  # in the mixer's own words
                    raise
                raise ValueError(f"mixer {name!r}: {found[1]}") from error
            if found is not None:
                raise ValueError(f"mixer {name!r}: {found[1]}")

        cls.__init__ = checked  # type: ignore[method-assign]
        return cls

    return register


def _check(
    name: str, /, dim: Any = None, device: Any = None, dtype: Any = None, **options: Any
) -> tuple[str, str] | None:
    """Check by their kinds what a mixer's constructor is given, and return what `out_of_range` finds."""
    if not is_int(dim):
        raise TypeError(f"dim={dim!r} is a {type(dim).__name__}; give a number of channels")
    if dim < 1:
        raise ValueError(f"dim={dim} is too small; give 1 channel or more")
    factory_kwargs(device, dtype)
    _MIXERS.checked(name, options)
    _MIXERS.check_kinds(name, options)
    return out_of_range(options)


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
    return _MIXERS.checked(name, options)(dim, device=device, dtype=dtype, **options)
