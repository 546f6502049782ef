"""Reduction methods by name."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from visionmix.names import check_options, nearest, options_of
from visionmix.reduction.tokens import Tokens

_METHODS: dict[str, type["Method"]] = {}


class Method(ABC):
    """How a model's tokens become fewer, block by block. It holds settings only: what changes is in `Tokens`.

    A subclass takes the blocks that it will run and the positions of the prefix tokens, then its options by keyword,
    and refuses what does not fit.

    Attributes:
        name: What it is registered as.
        trace_source: Whether `Tokens.source` is followed in every pass.
    """

    name: ClassVar[str]
    trace_source: bool = False

    @abstractmethod
    def __init__(self, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...], **options: Any) -> None: ...

    @abstractmethod
    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        """Return `tokens` behind `block`, the model's block number `index`."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Return a class decorator that registers a method under `name`.

    Raises:
        ValueError: `name` is taken.
    """

    def register(cls: type[Method]) -> type[Method]:
        if name in _METHODS:
            raise ValueError(f"method name={name!r} is taken by {_METHODS[name].__qualname__}; choose another name")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def list_methods() -> list[str]:
    """Return the names that `apply` knows, sorted."""
    return sorted(_METHODS)


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of the method called `name`, by name.

    Raises:
        ValueError: no method has this name.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method={name!r}{nearest(str(name), _METHODS)}; the methods are {list_methods()}")
    return options_of(_METHODS[name].__init__, besides=("self", "blocks", "prefix_positions"))


def create_method(name: str, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...], **options: Any) -> Method:
    """Return the method called `name`, fitted to a model's blocks and prefix tokens.

    Raises:
        TypeError: a block is of a class that the method cannot take, or an option's value has a wrong type.
        ValueError: `name` or an option is unknown (the message has the nearest one), or an option's value is refused.
    """
    check_options(f"method {name!r}", options, method_options(name))
    return _METHODS[name](blocks, prefix_positions, **options)


def check_leading(name: str, prefix_positions: tuple[int, ...]) -> None:
    """Raise ValueError unless the prefix tokens are the first of the sequence."""
    if prefix_positions != tuple(range(len(prefix_positions))):
        raise ValueError(f"method {name!r} needs the prefix tokens first; this model has them at {prefix_positions}")
