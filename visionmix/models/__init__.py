"""One file a published family; importing this package registers every model with timm."""

from visionmix.models import agent, flatten, msvmamba, skeletons, vig, vmamba
from visionmix.models.family import Published, Variant, list_family_models, published, register_family

__all__ = [
    "Published",
    "Variant",
    "agent",
    "flatten",
    "list_family_models",
    "msvmamba",
    "published",
    "register_family",
    "skeletons",
    "vig",
    "vmamba",
]
