"""MAViT as a host: linear attention in the first two stages, softmax attention with rotary positions in the last two.

Source: MALA (Fan et al. 2025, arXiv 2507.00698); RALA (Fan et al. 2024, arXiv 2411.07635) has the same layout.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.layers import LayerNorm

from visionmix.backbones import Block, Hierarchical
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import BatchNorm, ConvDownsample, ConvMlp, ConvPosition, ProjectionHead, deep_conv_stem
from visionmix.models.keys import NEXT_STAGE, KeyMap
from visionmix.models.layout import Layout

_STEM = {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2", 6: "conv3", 7: "norm3", 9: "conv4", 10: "norm4"}
_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.(\d+)\.", lambda match: f"stem.{_STEM[int(match[1])]}."),
        NEXT_STAGE,
        (r"\.downsample\.reduction\.", ".downsample.conv."),
        (r"\.downsample\.norm\.", ".downsample.norm.bn."),
        (r"^layers\.", "stages."),
        (r"\.gamma_(\d)$", r".scale\1.gamma"),
        (r"\.norm(\d)\.norm\.", r".norm\1."),
        (r"\.attn\.qkvo\.", ".mixer.qkv."),
        (r"\.attn\.", ".mixer."),
        (r"\.ffn\.dwconv\.", ".mlp.conv."),
        (r"\.ffn\.", ".mlp."),
        (r"\.pos\.", ".pos.conv."),
        (r"^norm\.", "head.norm.bn."),
        (r"^proj\.", "head.proj."),
        (r"^head\.(?=weight|bias)", "head.fc."),
    ],
    drop={r"\.RoPE\.angle$": "the angles of the rotary encoding, which are computed"},
    reshape=True,
)
_SOFTMAX = {"name": "softmax", "rotary": True, "lepe": 5, "gate": True}


class Size(NamedTuple):
    """Channels, blocks and heads of each stage."""

    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]


TINY = Size((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8))
SMALL = Size((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8))
BASE = Size((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8))
LARGE = Size((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10))
TEST = Size((16, 16, 32, 32), (1, 1, 1, 1), (1, 1, 2, 2))


def mavit(mixer: MixerSpec, size: Size, hidden_size: int, **options: Any) -> Layout:
    """Return the layout of MAViT.

    Args:
        mixer: The mixer of the first two stages, as the skeleton takes it.
        size: Channels, blocks and heads.
        hidden_size: Channels of the projection before the classifier.
        **options: More options of the skeleton.
    """
    layers = {
        "stem_layer": deep_conv_stem,
        "downsample_layer": partial(ConvDownsample, norm_layer=BatchNorm),
        "block_layer": partial(Block, pos_layer=ConvPosition),
        "mlp_layer": partial(ConvMlp, mlp_ratio=3.5, act_first=True),
        "norm_layer": partial(LayerNorm, eps=1e-6),
        "final_norm_layer": None,
        "layer_scale": 1.0,
        "head_layer": partial(ProjectionHead, hidden_size=hidden_size),
    }
    mixers = {"mixer": [mixer, mixer, _SOFTMAX, _SOFTMAX]}
    return Layout(Hierarchical, layers | mixers | size._asdict() | options, _KEYS)
