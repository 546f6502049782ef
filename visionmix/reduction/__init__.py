"""Token merging and pruning around a built model: `apply` one of `list_methods()`, `remove` it."""

from visionmix.reduction.algm import ALGM
from visionmix.reduction.ats import ATS
from visionmix.reduction.avit import AViT
from visionmix.reduction.dynamicvit import DynamicViT
from visionmix.reduction.evit import EViT
from visionmix.reduction.matching import match
from visionmix.reduction.mctf import MCTF, MCTFFast
from visionmix.reduction.methods import Method, list_methods, register_method
from visionmix.reduction.named import register_model
from visionmix.reduction.rmeeto import RMeeTo
from visionmix.reduction.ssm_prune import SSMPrune
from visionmix.reduction.tokens import Tokens
from visionmix.reduction.tome import ToMe
from visionmix.reduction.wrapping import apply, remove
from visionmix.reduction.zero_tprune import ZeroTPrune

__all__ = [
    "ALGM",
    "ATS",
    "MCTF",
    "AViT",
    "DynamicViT",
    "EViT",
    "MCTFFast",
    "Method",
    "RMeeTo",
    "SSMPrune",
    "ToMe",
    "Tokens",
    "ZeroTPrune",
    "apply",
    "list_methods",
    "match",
    "register_method",
    "register_model",
    "remove",
]
