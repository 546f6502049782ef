"""One file a published family; importing this package registers every model with timm."""

from visionmix.models import msvmamba, plainmamba, skeletons, vig, vim, vmamba
from visionmix.models.family import Published, Variant, list_family_models, published, register_family

__all__ = [
    "Published",
    "Variant",
    "list_family_models",
    "msvmamba",
    "plainmamba",
    "published",
    "register_family",
    "skeletons",
    "vig",
    "vim",
    "vmamba",
]
