"""Modules that share the children and parameters of another."""

import copy
from functools import cache
from typing import Any

from torch import nn


class Reduced(nn.Module):
    """The result of `apply`: a module with the children, parameters and attributes of the given model."""

    base: type[nn.Module]

    @property
    def given(self) -> nn.Module:
        """The model that was given to `apply`."""
        return self.__dict__["_given"]

    def __reduce__(self) -> str | tuple[Any, ...]:
        mixin, base = type(self).__bases__
        return _blank, (mixin, base), self.__getstate__()


def reduced(model: nn.Module, mixin: type[Reduced]) -> Reduced:
    """Return a module of class `mixin` and that of `model`, with its children, parameters and attributes."""
    new = share(model, reduced_class(mixin, type(model)))
    remember(new, model)
    return new


def remember(model: Reduced, given: nn.Module) -> None:
    """Make `given` what `model` was made from."""
    model.__dict__["_given"] = given  # not by setattr, which would register it as a child


def share(module: nn.Module, cls: type[nn.Module] | None = None) -> nn.Module:
    """Return a module, of class `cls` or that of `module`, that holds the same children, parameters and attributes.

    A part that is replaced in one later (a classifier, say) stays unchanged in the other.
    """
    cls = cls or type(module)
    new = cls.__new__(cls)
    state = module.__getstate__()
    new.__setstate__({k: copy.copy(v) if isinstance(v, dict | list | set) else v for k, v in state.items()})
    return new


@cache
def reduced_class(mixin: type[Reduced], base: type[nn.Module]) -> type[Reduced]:
    """Return the class of `base` with the forward paths of `mixin`."""
    name = f"Reduced{base.__name__}"
    return type(name, (mixin, base), {"__module__": mixin.__module__, "__qualname__": name, "__doc__": mixin.__doc__})


def _blank(mixin: type[Reduced], base: type[nn.Module]) -> Reduced:
    cls = reduced_class(mixin, base)
    return cls.__new__(cls)
