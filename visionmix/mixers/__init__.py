"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name.

Every file here is imported; the class of every registered mixer is an attribute of this package.
"""

from torch import nn

from visionmix.mixers.registry import create_mixer, list_mixers, mixer_class, register_mixer
from visionmix.registry import import_modules

__all__ = ["create_mixer", "list_mixers", "register_mixer"]  # and every mixer's class


def __getattr__(name: str) -> type[nn.Module]:
    found = mixer_class(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


import_modules(__name__, __path__)
