"""One file per published family; importing this package registers every model with timm."""

from visionmix.models.family import Published, Variant, list_family_models, list_models, published
from visionmix.models.keys import Join, KeyMap
from visionmix.models.layout import Layout
from visionmix.models.loading import load_checkpoint
from visionmix.models.registration import register_family
from visionmix.models.weights import Weights
from visionmix.registry import import_modules

__all__ = [
    "Join",
    "KeyMap",
    "Layout",
    "Published",
    "Variant",
    "Weights",
    "list_family_models",
    "list_models",
    "load_checkpoint",
    "published",
    "register_family",
]

# Families import the names above from here.
import_modules(__name__, __path__)
