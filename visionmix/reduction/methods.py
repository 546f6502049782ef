"""Reduction methods by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from visionmix.reduction.tokens import Tokens
from visionmix.registry import Registry, is_int


class Method(ABC):
    """How a model's tokens become fewer, block by block. It holds settings; all that changes is in `Tokens`.

    A subclass takes the blocks that it will run and the positions of the prefix tokens, then its options by keyword,
    and refuses options that do not fit. One that has parameters is a `torch.nn.Module` as well, whose first base is
    `Method`: the reduced model's child `reduction`.

    Attributes:
        name: The name that it is registered under.
        knows_stages: Whether it reduces models of several resolutions: its constructor takes `depths`, the number of
            blocks at each.
        has_losses: Whether `losses` returns any, so that the reduced model has a ``forward_train``.
        trace_source: Whether `Tokens.source` is followed in every pass.
    """

    name: ClassVar[str]
    knows_stages: ClassVar[bool] = False
    has_losses: ClassVar[bool] = False
    trace_source: bool = False

    @abstractmethod
    def __init__(self, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...], **options: Any) -> None: ...

    def begin(self, tokens: Tokens) -> Tokens:
        """Return the model's embedded tokens as the first block gets them."""
        return tokens

    @abstractmethod
    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        """Return `tokens` after `block`, the model's block number `index`."""

    def train_step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        """Return `tokens` after `block` in training, where a method then works otherwise."""
        return self.step(block, tokens, index)

    def end(self, tokens: Tokens) -> Tokens:
        """Return the last block's tokens as the model's last norm gets them."""
        return tokens

    def cut(self, count: int) -> "Method":
        """Return the method, itself, for the model's first `count` blocks, as a feature extractor keeps them."""
        return self

    def losses(self, model: nn.Module, images: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        """Return the method's own losses, scalars by name with their weights in them.

        Args:
            model: The reduced model, in training.
            images: (batch, channels, height, width).
            tokens: What the model made of them, after `end` and before its last norm.
        """
        return {}

    def __repr__(self) -> str:
        settings = {key: value for key, value in vars(self).items() if not key.startswith("_") and key != "training"}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


_METHODS: Registry[Method] = Registry("method", besides=("blocks", "prefix_positions", "depths"))


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
        TypeError: an option that is True or False has another value.
        ValueError: `name` or an option is unknown (the message has the nearest one), or one that it needs is missing.
    """
    cls = _METHODS.checked(name, options)
    for option, parameter in _METHODS.options(name).items():
        if isinstance(parameter.default, bool) and not isinstance(options.get(option, True), bool):
            raise TypeError(f"{option}={options[option]!r}: give True or False")
    return cls


def quarters(depth: int) -> list[int]:
    """Return the numbers of the blocks a quarter, a half and three quarters of the way: 3, 6, 9 of 12."""
    return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})


def chosen_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Return the option `layers` as a list of numbers of blocks, checked.

    Raises:
        TypeError: `layers` is no list of ints.
        ValueError: a number is outside the model's `depth` or comes twice.
    """
    if not isinstance(layers, list | tuple | range) or not all(is_int(layer) for layer in layers):
        raise TypeError(f"layers={layers!r}: give a list of block numbers")
    if not all(0 <= layer < depth for layer in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"layers={layers}: give different block numbers from 0 to {depth - 1}")
    return list(layers)


def share_of(count: int, rate: float, up: bool = False) -> int:
    """Return ``int(rate * count)``, or with `up` ``ceil(rate * count)``, in float64.

    A trace has tensors for sizes, whose products with a float are of float32.
    """
    product = rate * (int(count) if isinstance(count, Tensor) else count)
    return math.ceil(product) if up else int(product)
