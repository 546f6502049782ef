"""One file a published family; importing this package registers every model with timm."""

from visionmix.models import (
    agent,
    atrous_vmamba,
    efficient_vmamba,
    flatten,
    mavit,
    msvmamba,
    nat,
    plainmamba,
    skeletons,
    vig,
    vim,
    vmamba,
)
from visionmix.models.family import Published, Variant, list_family_models, published, register_family

__all__ = [
    "Published",
    "Variant",
    "agent",
    "atrous_vmamba",
    "efficient_vmamba",
    "flatten",
    "list_family_models",
    "mavit",
    "msvmamba",
    "nat",
    "plainmamba",
    "published",
    "register_family",
    "skeletons",
    "vig",
    "vim",
    "vmamba",
]
