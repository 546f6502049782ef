"""SG-Former: attention at two scales that weighs the cells, and attention to cells merged by these weights, in turn.

Source: SG-Former (Ren et al. 2023, arXiv 2308.12216). The mixers are `visionmix.mixers.HybridScaleAttention` and
`SelfGuidedAttention`. The published model takes images of 224 pixels alone; here the position embedding is resampled,
and the mixers' docstrings say how windows and groups fit maps of other sizes.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from timm.layers import GroupNorm1, LayerNorm, build_sincos2d_pos_embed
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical, Stage
from visionmix.layers import ConvMlp, ConvsDownsample, PositionEmbedding, Stem, StemConv
from visionmix.mixers.self_guided import HybridScaleAttention, SelfGuidedAttention
from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import doubled
from visionmix.models.hosts.pvt import pvt_v2
from visionmix.models.keys import shifted


def _keys_then_values(parts: Sequence[Tensor]) -> Tensor:
    """Return one projection to the keys of all heads, then the values, from one for each half of the heads."""
    return torch.cat([half for pair in zip(*(part.chunk(2) for part in parts), strict=True) for half in pair])


_KEYS = KeyMap(
    rename=[
        (r"^pos_embed$", "pos_embed1"),
        (r"^patch_embed1\.norm\.", "stem.norm."),
        (r"^patch_embed1\.conv\.(\d)\.", lambda match: f"stem.conv{int(match[1]) // 2 + 1}."),
        (r"^patch_embed(\d)\.", shifted("stages.{}.downsample.", -1)),
        (r"\.conv(\d)\.c\.", r".conv\1."),
        (r"\.conv(\d)\.bn\.", r".norm\1."),
        # Blocks of odd number are the self-guided ones: their two projections serve half of the heads each.
        (r"^(block\d\.\d*[13579]\.attn)\.kv([12])\.", r"\1.heads\2."),
        (r"\.attn\.f(\d)\.", shifted(".attn.merges.{}.", -1)),
        (r"\.attn\.(q|kv)1\.", r".attn.global_\1."),
    ]
)
_JOINS = (Join(("q2", "kv2"), "local_qkv"), Join(("heads1", "heads2"), "kv", _keys_then_values))


class _Block(Block):
    """`Block` with the significance of cells, (batch, height, width): a mixer that weighs cells returns it, one that
    ranks them reads it, any other leaves it unchanged.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    gives: Final[bool]
    reads: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.gives = isinstance(self.mixer, HybridScaleAttention)
        self.reads = isinstance(self.mixer, SelfGuidedAttention)

    def forward(self, x: Tensor, significance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.norm1(x)
        if self.gives:
            y, significance = self.mixer.with_significance(y)
        elif self.reads:
            y = self.mixer(y, significance)
        else:
            y = self.mixer(y)
        x = self.scale1(x, y)
        if self.has_mlp:
            x = self.scale2(x, self.mlp(self.norm2(x)))
        return x, significance


class _Stage(Stage):
    """`Stage` that carries the significance of cells from block to block."""

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        significance = torch.jit.annotate(Tensor | None, None)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, significance = checkpoint(block, x, significance)
            else:
                x, significance = block(x, significance)
        return self.norm(x)


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return three 3x3 convolutions, the first and last of stride 2, and a norm over channels."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
    conv = StemConv(embed_dim, 3, 2, bias=False, norm_layer=GroupNorm1, act_layer=nn.GELU)
    stem = Stem(in_chans, [conv, conv._replace(stride=1), conv._replace(act_layer=None)], **dd)
    stem.add_module("norm", LayerNorm(embed_dim, eps=1e-5, **dd))
    return stem


def _downsample(dim: int, out_dim: int, **dd: Any) -> ConvsDownsample:
    """Return a 1x1, a depthwise 3x3 convolution of stride 2 and a 1x1 convolution, GELU between."""
    conv = StemConv(out_dim, 1, bias=False, norm_layer=GroupNorm1, act_layer=nn.GELU)
    depthwise = conv._replace(kernel_size=3, stride=2, groups=out_dim)
    return ConvsDownsample(dim, [conv, depthwise, conv._replace(act_layer=None)], **dd)


class _Waves(PositionEmbedding):
    """A learned embedding that begins as sines and cosines of columns and rows."""

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        _, rows, columns, dim = self.weight.shape
        with torch.no_grad():
            self.weight.copy_(build_sincos2d_pos_embed([rows, columns], dim).unflatten(0, (rows, columns)))


_GROUPS = ((8, (196, 56, 28)), (4, (49, 14, 7)), (2, (2, 1)))
_SMALL = ((8, (28, 14, 7)), (4, (7, 4, 2)), (2, (2, 1)))


def _layout(dim: int, depths: Sequence, num_heads: Sequence, groups: Sequence = _GROUPS, **options: Any) -> Layout:
    mixers = [
        {"cycle": [{"name": "hybrid_scale", "sr_ratio": ratio}, {"name": "self_guided", "group_sizes": sizes}]}
        for ratio, sizes in groups
    ]
    host = pvt_v2(doubled(dim), depths, [*mixers, {"name": "self_guided", "group_sizes": ()}], num_heads)
    layers = {
        "stem_layer": _stem,
        "downsample_layer": _downsample,
        "pos_embed": [_Waves, None, None, None],
        "stage_layer": _Stage,
        "block_layer": _Block,
        "mlp_layer": partial(ConvMlp, mlp_ratio=4.0),
    }
    return Layout(Hierarchical, host.options | layers | options, _KEYS + replace(host.keys, join=_JOINS))


_PAGE = "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4"

VARIANTS = {
    "sgformer_small": Variant(_layout(64, (2, 4, 16, 1), (2, 4, 8, 16)), {"in1k": Weights(page=_PAGE)}),
    "sgformer_medium": Variant(_layout(64, (2, 6, 28, 2), (2, 4, 8, 16)), {"in1k": Weights(page=_PAGE)}),
    "sgformer_base": Variant(_layout(96, (4, 6, 24, 2), (4, 6, 12, 24)), {"in1k": Weights(page=_PAGE, top1=84.7)}),
    # Small groups: torch.export takes an axis of one group for one in maps of all sizes.
    "test_sgformer": Variant(_layout(16, (2, 2, 3, 1), (2, 2, 4, 4), _SMALL, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2308.12216",
    paper_name="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
)
