"""MAViT and RAVLT: magnitude-aware and rank-augmented linear attention in one skeleton, softmax in its later stages.

Source: MALA (Fan et al. 2025, arXiv 2507.00698) and RALA (Fan et al. 2024, arXiv 2411.07635). The mixers are
`visionmix.mixers.MagnitudeAwareLinearAttention` and `RankAugmentedLinearAttention`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Block, Hierarchical
from visionmix.layers import BatchNorm, ConvDownsample, ConvMlp, ConvPosition, ProjectionHead, deep_conv_stem
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap, reshape_to

_NONE = Published()
_SOFTMAX = {"name": "softmax", "rotary": True, "lepe": 5, "gate": True}
_LAYERS = {
    "stem_layer": deep_conv_stem,
    "downsample_layer": partial(ConvDownsample, norm_layer=BatchNorm),
    "block_layer": partial(Block, pos_layer=ConvPosition),
    "mlp_layer": partial(ConvMlp, mlp_ratio=3.5, act_first=True),
    "norm_layer": partial(LayerNorm, eps=1e-6),
    "final_norm_layer": None,
    "layer_scale": 1.0,
}


def _variant(
    mixer: str,
    hidden_size: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    weights: dict[str, str],
    published: Published = _NONE,
    **options: Any,
) -> Variant:
    sizes = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
    mixers = [mixer, mixer, _SOFTMAX, _SOFTMAX]
    head = partial(ProjectionHead, hidden_size=hidden_size)
    return Variant(Hierarchical, _LAYERS | sizes | {"mixer": mixers, "head_layer": head} | options, weights, published)


def _weights(family: str, size: str) -> dict[str, str]:
    return {"hf_hub_id": f"aldjalkdf/{family}", "hf_hub_filename": f"{family}_{size}.pth"}


_SIZES = {
    "tiny": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8)),
    "small": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    "base": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8)),
    "large": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10)),
}
_RAVLT = {
    "tiny": Published(15, 2.4),
    "small": Published(26, 4.6, 84.4),
    "base": Published(48, 9.9),
    "large": Published(95, 16.0),
}
_TEST = ((16, 16, 32, 32), (1, 1, 1, 1), (1, 1, 2, 2))

VARIANTS = {
    **{
        f"mavit_{name}": _variant("mala", 2560 if name == "large" else 2048, *sizes, _weights("MAViT", name[0].upper()))
        for name, sizes in _SIZES.items()
    },
    **{
        f"ravlt_{name}": _variant("rala", 1024, *sizes, _weights("RAVLT", name[0].upper()), _RAVLT[name])
        for name, sizes in _SIZES.items()
    },
    "test_mavit": _variant("mala", 48, *_TEST, {}, img_size=96),
    "test_ravlt": _variant("rala", 48, *_TEST, {}, img_size=96),
}

_STEM = {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2", 6: "conv3", 7: "norm3", 9: "conv4", 10: "norm4"}
_NAMES = [
    (r"^patch_embed\.proj\.(\d+)\.", lambda match: f"stem.{_STEM[int(match[1])]}."),
    # The published code ends a stage with its downsampler; here the next stage begins with it.
    (r"^layers\.(\d+)\.downsample\.reduction\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.norm.bn."),
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
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    drop = {r"\.RoPE\.angle$": "the angles of the rotary encoding, which are computed"}
    return KeyMap(rename=_NAMES, drop=drop, transform=reshape_to(model))


register_family(
    __name__, VARIANTS, key_map=key_map, paper="arXiv 2507.00698 (MAViT), 2411.07635 (RAVLT)", license="unknown"
)
