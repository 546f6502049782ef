"""Mixers by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from visionmix.registry import Registry, factory_kwargs, is_int, out_of_range, plain

_MIXERS: Registry[nn.Module] = Registry("mixer", besides=("dim", "device", "dtype"))


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a mixer under `name` and has its constructor check what it is given.

    The options of a mixer are checked by their annotations. Those of this library's own mixers, whose names have one
    meaning everywhere, are also checked by their range.

    Raises:
        TypeError: `name` is no str, or what is decorated no class of modules.
        ValueError: `name` is empty or taken.
    """
    add = _MIXERS.register(name)

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{cls!r} cannot be the mixer {name!r}; decorate a class of torch.nn.Module")
        add(cls)
        build = cls.__init__  # type: ignore[misc]
        parameters = list(inspect.signature(build).parameters.values())[1:]
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = [each.name for each in parameters if each.kind in by_place]

        @functools.wraps(build)
        def checked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            found = None
            registered = _MIXERS.classes()
            outermost = next((each for each in type(self).__mro__ if each in registered), None)
            if outermost is cls:  # its parents get what it has checked
                args, kwargs = plain(args), plain(kwargs)
                found = _check(name, cls, dict(zip(positional, args, strict=False)) | kwargs)
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


def _check(name: str, cls: type[nn.Module], given: Mapping[str, Any]) -> tuple[str, str] | None:
    """Check by their kinds what a mixer's constructor is given, and return what `out_of_range` finds."""
    if "dim" in given:
        dim = given["dim"]
        if not is_int(dim):
            raise TypeError(f"dim={dim!r} is a {type(dim).__name__}; give a number of channels")
        if dim < 1:
            raise ValueError(f"dim={dim} is too small; give 1 channel or more")
    factory_kwargs(given.get("device"), given.get("dtype"))
    known = _MIXERS.options(name)
    options = {option: value for option, value in given.items() if option in known}  # of others, Python says what fails
    _MIXERS.check_kinds(name, options)
    own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return out_of_range(options) if own else None


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
