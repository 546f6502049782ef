"""How the models of a family are built, and how their files name each part."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from visionmix.models.keys import KeyMap


@dataclass(frozen=True)
class Layout:
    """A skeleton, the options it is built with, and the keys of files that hold its weights as published.

    Attributes:
        skeleton: The class that is built.
        options: Its arguments.
        keys: How the keys of published files become the model's.
        first_conv: Name of the layer that takes the images' channels.
        classifier: Name of the last linear layer; several names for a model with several classifiers.
    """

    skeleton: type[nn.Module]
    options: Mapping[str, Any]
    keys: KeyMap = field(default_factory=KeyMap)
    first_conv: str = "stem.conv1"
    classifier: str | tuple[str, ...] = "head.fc"

    def with_options(self, **options: Any) -> "Layout":
        """Return this layout with `options` replacing its own of the same names."""
        return replace(self, options={**self.options, **options})

    def with_keys(self, keys: KeyMap) -> "Layout":
        """Return this layout with `keys` applied after its own key map."""
        return replace(self, keys=self.keys + keys)
