"""Reduction methods by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from visionmix.reduction.tokens import Tokens
from visionmix.registry import Registry


class Method(ABC):
    """How a model's tokens become fewer, block by block. It holds settings; all that changes is in `Tokens`.

    A subclass takes the blocks that it will run and the positions of the prefix tokens, then its options by keyword,
    and refuses options that do not fit.

    Attributes:
        name: The name that it is registered under.
        trace_source: Whether `Tokens.source` is followed in every pass.
    """

    name: ClassVar[str]
    trace_source: bool = False

    @abstractmethod
    def __init__(self, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...], **options: Any) -> None: ...

    @abstractmethod
    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        """Return `tokens` after `block`, the model's block number `index`."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


_METHODS: Registry[Method] = Registry("method", besides=("blocks", "prefix_positions"))


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Return a class decorator that registers a method under `name`.

    Raises:
        ValueError: `name` is taken.
    """

    def register(cls: type[Method]) -> type[Method]:
        cls = _METHODS.register(name)(cls)
        cls.name = name
        return cls

    return register


def list_methods() -> list[str]:
    """Return the names that `apply` knows, sorted."""
    return _METHODS.names()


def method_class(name: str, options: Mapping[str, Any]) -> type[Method]:
    """Return the method called `name`, which knows all of `options`.

    Raises:
        ValueError: `name` or an option is unknown (the message has the nearest one), or one that it needs is missing.
    """
    return _METHODS.checked(name, options)


def check_leading(name: str, prefix_positions: tuple[int, ...]) -> None:
    """Raise ValueError unless the prefix tokens are the first of the sequence."""
    if prefix_positions != tuple(range(len(prefix_positions))):
        raise ValueError(f"method {name!r} needs the prefix tokens first; this model has them at {prefix_positions}")
