"""PVT and PVTv2 as hosts: patch embeddings before every stage.

Source: PVT (Wang et al. 2021, arXiv 2102.12122) and PVTv2 (Wang et al. 2021, arXiv 2106.13797).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm

from visionmix.backbones import Hierarchical
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import ConvDownsample, ConvMlp, PositionEmbedding, mlp, patch_stem
from visionmix.models.hosts import HEAD
from visionmix.models.keys import Join, KeyMap, shifted
from visionmix.models.layout import Layout

_Mixers = MixerSpec | list[MixerSpec | list[MixerSpec]]

_KEYS = KeyMap(
    rename=[
        (r"^patch_embed1\.proj\.", "stem.conv1."),
        (r"^patch_embed1\.norm\.", "stem.norm1."),
        (r"^patch_embed(\d)\.proj\.", shifted("stages.{}.downsample.conv.", -1)),
        (r"^patch_embed(\d)\.norm\.", shifted("stages.{}.downsample.norm.", -1)),
        (r"^pos_embed(\d)$", shifted("stages.{}.pos_embed.weight", -1)),
        (r"^block(\d)\.", shifted("stages.{}.blocks.", -1)),
        (r"^norm(\d)\.", shifted("stages.{}.norm.", -1)),
        (r"\.attn\.", ".mixer."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
        HEAD,
    ],
    join=[Join(("q", "kv"), "qkv")],
)


def pvt(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mixer: _Mixers,
    num_heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
) -> Layout:
    """Return the layout of PVT, without its class token.

    Every stage has patches that do not overlap and a position embedding; the mean of the last map goes to the
    classifier without a norm.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mixer: The mixers, as the skeleton takes them.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden width of each stage's feed-forwards over its channels.
    """
    options = {
        "stem_layer": patch_stem,
        "downsample_layer": partial(ConvDownsample, kernel_size=2),
        "pos_embed": partial(PositionEmbedding, mode="bilinear"),
        "mlp_layer": [partial(mlp, mlp_ratio=ratio) for ratio in mlp_ratios],
        "final_norm_layer": None,
        **_sizes(embed_dims, depths, mixer, num_heads),
    }
    return Layout(Hierarchical, options, _KEYS)


def pvt_v2(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mixer: _Mixers,
    num_heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
) -> Layout:
    """Return the layout of PVTv2; the arguments are those of `pvt`.

    Patches overlap, feed-forwards have a depthwise convolution instead of position embeddings, and every stage
    ends in a norm.
    """
    options = {
        "stem_layer": partial(patch_stem, kernel_size=7, padding=3),
        "downsample_layer": ConvDownsample,
        "mlp_layer": [partial(ConvMlp, mlp_ratio=ratio, residual=False) for ratio in mlp_ratios],
        "stage_norm_layer": "same",
        "final_norm_layer": None,
        **_sizes(embed_dims, depths, mixer, num_heads),
    }
    return Layout(Hierarchical, options, _KEYS)


def _sizes(
    embed_dims: Sequence[int], depths: Sequence[int], mixer: _Mixers, num_heads: Sequence[int]
) -> dict[str, Any]:
    return {
        "embed_dims": tuple(embed_dims),
        "depths": tuple(depths),
        "num_heads": tuple(num_heads),
        "mixer": mixer,
        # The norms of the patch embeddings have PyTorch's epsilon, 1e-5, which stem and downsampler have too.
        "norm_layer": partial(LayerNorm, eps=1e-6),
    }
