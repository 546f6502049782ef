"""Flowformer: linear attention as a flow that is conserved at its sources and its sinks.

Source: Flowformer (Wu et al. 2022, arXiv 2202.06258). The mixer is `visionmix.mixers.FlowAttention`, of 12 heads in
every stage. The published model takes square images of the built size alone; here the position embedding is resampled
to others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Block, Hierarchical, Residual
from visionmix.layers import ConvDownsample, PositionEmbedding, mlp, patch_stem
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, doubled

_KEYS = KeyMap(
    rename=[
        (r"^pos_embed$", "stages.0.pos_embed.weight"),
        (r"^patch_embed\.0\.proj\.", "stem.conv1."),
        (r"^patch_embed\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma$", ".scale2.gamma"),
        HEAD,
    ]
)


class _Block(Block):
    """`Block` whose feed-forward alone has a learned scale."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.scale1 = Residual(dim, options["drop_path"])


def _layout(embed_dim: int, depths: Sequence[int], num_heads: int, **options: Any) -> Layout:
    layers = {
        "mixer": "flow",
        "stem_layer": partial(patch_stem, norm_layer=None),
        "pos_embed": [PositionEmbedding, None, None, None],
        "downsample_layer": partial(ConvDownsample, kernel_size=2, norm_layer=nn.Identity),
        "block_layer": _Block,
        "mlp_layer": mlp,
        "norm_layer": partial(LayerNorm, eps=1e-6),
        "layer_scale": 1e-5,
    }
    sizes = {"embed_dims": doubled(embed_dim), "depths": tuple(depths), "num_heads": (num_heads,) * 4}
    return Layout(Hierarchical, layers | sizes | options, _KEYS)


_IN1K = Weights(page="https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886/", top1=80.6)

VARIANTS = {
    "flowformer_tiny": Variant(_layout(96, (3, 3, 10, 3), 12), {"in1k": _IN1K}),
    "test_flowformer": Variant(_layout(16, (1, 1, 2, 1), 4, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2202.06258",
    paper_name="Flowformer: Linearizing Transformers with Conservation Flows",
    license="mit",
)
