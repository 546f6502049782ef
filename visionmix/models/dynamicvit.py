"""DynamicViT: DeiT whose tokens are dropped before three blocks, by learned predictors.

The method is `visionmix.reduction.DynamicViT`, applied to a DeiT as it is built: `keep_rate` and the method's other
options are the model's, `reduction.remove` gives the DeiT without it, and training adds the method's losses. `_256` is
a DeiT of 256 channels, between the published tiny and small ones.

Source: DynamicViT (Rao et al. 2021, arXiv 2106.02034).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import symbolic_trace

from visionmix.backbones import Plain
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import deit
from visionmix.reduction import DynamicViT
from visionmix.reduction.backbones import ReducedPlain
from visionmix.reduction.sharing import remember, share

_PARTS = {"in_conv.0": "norm", "in_conv.1": "proj", "out_conv.0": "fc1", "out_conv.2": "fc2", "out_conv.4": "fc3"}
_KEYS = KeyMap(
    rename=[
        (r"^score_predictor\.", "reduction.predictors."),
        *((rf"\.{re.escape(published)}\.", f".{own}.") for published, own in _PARTS.items()),
    ],
    lacks={r"^reduction\.predictors\.": "a DeiT, from which training begins, has no predictors"},
)


class PrunedPlain(ReducedPlain, Plain):
    """`Plain` with the tokens of its blocks pruned by `DynamicViT`: what `reduction.apply` makes of one.

    Args:
        keep_rate: As `DynamicViT` has it, like the following ones.
        layers: Numbers of the blocks before which tokens are dropped.
        teacher: For the distillation losses.
        ratio_weight: Weight of the loss of shares.
        distill_weight: Weight of each of both distillation losses.
        trace_source: Whether every pass follows which token holds which cell.
        **options: Those of `Plain`.
    """

    def __init__(
        self,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        teacher: str | nn.Module | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        trace_source: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        remember(self, share(self, Plain))
        self.whole_depth = len(self.blocks)
        self.reduction = DynamicViT(
            list(self.blocks),
            self.prefix_of(self),
            keep_rate=keep_rate,
            layers=layers,
            teacher=teacher,
            ratio_weight=ratio_weight,
            distill_weight=distill_weight,
            trace_source=trace_source,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the module that `torch.jit.script` compiles in place of this one: its traced graph, in its mode."""
        return symbolic_trace(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: those of `Plain`, with the classifier in the last norm's, and the predictors."""
        groups = super().group_matcher(coarse)
        blocks, _ = groups["blocks"]
        return {**groups, "blocks": [blocks, (r"^norm|^head", (99999,))]}

    __reduce__ = object.__reduce__  # unlike its parent's, this class is found by its name


def _layout(dim: int, heads: int, depth: int = 12) -> Layout:
    host = deit.deit(dim, heads, ["softmax"] * depth).with_keys(_KEYS)
    return Layout(PrunedPlain, host.options, host.keys)


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1", top1=top1)}


VARIANTS = {
    "dynamicvit_deit_small": Variant(_layout(384, 6), _in1k("698896dfbcea430b9591", 79.32), gmacs=2.9),
    "dynamicvit_deit_256": Variant(_layout(256, 4), _in1k("b0e1ff6af1004039855e", 76.53), gmacs=1.3),
    "dynamicvit_deit_base": Variant(_layout(768, 12), _in1k("660f27ddb6b945a797a8", 81.43), gmacs=11.4),
    "test_dynamicvit": Variant(_layout(32, 2, depth=4).with_options(img_size=96, keep_rate=0.6)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2106.02034",
    paper_name="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    license="mit",
)
