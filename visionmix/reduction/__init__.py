"""Token merging and pruning around a built model: `apply` one of `list_methods()`, `remove` it."""

from visionmix.reduction.evit import EViT
from visionmix.reduction.matching import match
from visionmix.reduction.methods import Method, list_methods, register_method
from visionmix.reduction.ssm_prune import SSMPrune
from visionmix.reduction.tokens import Tokens
from visionmix.reduction.tome import ToMe
from visionmix.reduction.wrapping import apply, remove

__all__ = [
    "EViT",
    "Method",
    "SSMPrune",
    "ToMe",
    "Tokens",
    "apply",
    "list_methods",
    "match",
    "register_method",
    "remove",
]
