"""Mamba-R (Mamba-Reg): Vim with registers spread evenly among the patches instead of a class token.

Source: Mamba-R (Wang et al. 2024, arXiv 2405.14858). The layout is Vim's; the head classifies all registers together.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from visionmix.layers import TokenHead
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vim import vim


class RegisterHead(TokenHead):
    """The classifier of a sequence with registers: ``fc(dropout(pool(x)))``, where pool reads all registers.

    The pooling "token" concatenates the registers r_1 ... r_n, each projected to fewer channels if `reduce` is more
    than 1: ``norm(concat(W r_1, ..., W r_n))``, or ``concat(r_1, ..., r_n)``. The other poolings are those of
    `visionmix.layers.TokenHead`, which read the cells; W and the norm are left out there.

    Shapes: (batch, tokens, in_features) to (batch, num_classes); to (batch, tokens, num_classes) without pooling.

    Source: Mamba-R (Wang et al. 2024, arXiv 2405.14858).

    Args:
        in_features: Channels of the tokens.
        num_classes: Outputs; 0 for no classifier.
        count: Number of registers.
        reduce: Channels of a register over those that W leaves; 1 for neither W nor norm.
        pooling: `pool_type`, `drop_rate` and `place`, as those of `TokenHead`.

    Raises:
        ValueError: `pool_type` is unknown, or `reduce` does not divide `in_features`.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, count: int, reduce: int, device=None, dtype=None, **pooling: Any
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_features, 0, count=count, **pooling, **dd)
        if reduce < 1 or in_features % reduce:
            raise ValueError(f"reduce={reduce} does not divide in_features={in_features}; give a divisor, or 1")
        self.width = count * (in_features // reduce)
        self.neck = nn.Linear(in_features, in_features // reduce, bias=False, **dd) if reduce > 1 else nn.Identity()
        self.norm = RmsNorm(self.width, eps=1e-5, **dd) if reduce > 1 else nn.Identity()
        self._classify(num_classes, **dd)

    def _classify(self, num_classes: int, **dd: Any) -> None:
        self.hidden_size = self.width if self.pool_type == "token" else self.num_features
        self.fc = nn.Linear(self.hidden_size, num_classes, **dd) if num_classes else nn.Identity()

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling where one is given."""
        super().reset(0, pool_type)
        self._classify(num_classes)

    @torch.jit.ignore
    def drop_projection(self) -> None:
        """Remove the registers' projection, for a model that returns features alone."""
        self.neck = self.norm = nn.Identity()
        self.width = self.count * self.num_features

    def pool_prefix(self, prefix: Tensor) -> Tensor:
        return self.norm(self.neck(prefix).flatten(1))


_KEYS = KeyMap(
    rename=[
        (r"^pos_embed_cls$", "class_token.pos_embed"),
        (r"^neck\.", "head.neck."),
        (r"^norm_neck\.", "head.norm."),
    ]
)


def _layout(embed_dim: int, reduce: int, depth: int = 24, registers: int = 12, **options: Any) -> Layout:
    layers = {
        "prefix_tokens": {"count": registers, "place": "evenly"},
        "head_layer": partial(RegisterHead, reduce=reduce),
    }
    return vim(embed_dim, depth, **layers, **options).with_keys(_KEYS)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    file = f"mambar_{size}_patch16_224.pth"
    return {"in1k": Weights(hf_hub_id="Wangf3014/Mamba-Reg", file=file, top1=top1, crop_pct=1.0)}


VARIANTS = {
    "mambar_tiny": Variant(_layout(192, 1)),
    "mambar_small": Variant(_layout(384, 2), _in1k("small", 81.4)),
    "mambar_base": Variant(_layout(768, 4), _in1k("base", 83.0)),
    "mambar_large": Variant(_layout(1024, 8, depth=48, registers=16), _in1k("large", 83.6)),
    "test_mambar_tiny": Variant(_layout(32, 4, depth=3, registers=4, img_size=96)),
}

register_family(__name__, VARIANTS, paper="arXiv 2405.14858", paper_name="Mamba-R: Vision Mamba ALSO Needs Registers")
