"""S2AFormer: strip self-attention, whose queries and keys have one channel a head, after depthwise convolutions.

Source: S2AFormer (Xu et al. 2025, arXiv 2505.22195), which has neither public code nor weights. The mixer is
`visionmix.mixers.StripAttention`. From the paper: four stages of hybrid perception blocks, each a local interaction
module of convolutions, strip self-attention and a feed-forward, in five sizes. Decided here: the layers of the local
interaction module, a depthwise 3x3 convolution and a projection, whose result is added; stem and downsamplers of 3x3
convolutions; keys and values of squares of 8, 4, 2 and 1 cells a side, as in PVT; feed-forwards of ratio 4; all widths
and depths, so that parameters and GMACs are none of the paper's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from visionmix.backbones import Block, Hierarchical
from visionmix.layers import ConvDownsample, DepthwiseConvNormAct, conv_stem, mlp
from visionmix.models import Layout, Variant, register_family
from visionmix.models.hosts import doubled


def _local_interaction(dim: int, **dd: Any) -> nn.Sequential:
    """Return ``W gelu(batch_norm(depthwise3x3(x))) + b`` on maps (batch, height, width, dim)."""
    return nn.Sequential(DepthwiseConvNormAct(dim, **dd), nn.Linear(dim, dim, **dd))


def _layout(dims: Sequence[int], depths: Sequence[int], **options: Any) -> Layout:
    layers = {
        "embed_dims": dims,
        "depths": depths,
        "num_heads": [dim // dims[0] for dim in dims],
        "mixer": [{"name": "strip", "sr_ratio": ratio} for ratio in (8, 4, 2, 1)],
        "stem_layer": partial(conv_stem, act_layer=nn.GELU, norm_layer=nn.BatchNorm2d),
        "downsample_layer": ConvDownsample,
        "block_layer": partial(Block, pos_layer=_local_interaction),
        "mlp_layer": mlp,
    }
    return Layout(Hierarchical, layers | options)


VARIANTS = {
    "s2aformer_mini": Variant(_layout(doubled(24), (1, 1, 3, 1))),
    "s2aformer_tiny": Variant(_layout(doubled(32), (1, 1, 4, 2))),
    "s2aformer_xs": Variant(_layout(doubled(40), (2, 2, 6, 2))),
    "s2aformer_s": Variant(_layout(doubled(48), (2, 2, 8, 3))),
    "s2aformer_m": Variant(_layout(doubled(64), (2, 3, 9, 3))),
    "test_s2aformer": Variant(_layout(doubled(8), (1, 1, 2, 1), img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2505.22195",
    paper_name="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
)
