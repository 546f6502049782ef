"""NAT and DiNAT: neighborhood attention, dilated in every other block, in pyramids and at one resolution.

Source: NAT (Hassani et al. 2022, arXiv 2204.07143) and DiNAT (Hassani and Shi 2022, arXiv 2209.15001). The mixer is
`visionmix.mixers.NeighborhoodAttention`. `dinats_*` have Swin's stem, downsamplers and widths.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm

from visionmix.backbones import Hierarchical, Plain
from visionmix.layers import ConvDownsample, PatchMerging, conv_stem, mlp, patch_stem
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import doubled
from visionmix.models.keys import NEXT_STAGE

_KEYS = KeyMap(
    rename=[
        NEXT_STAGE,
        (r"^patch_embed\.proj\.(?=[a-z])", "stem.conv1."),
        (r"^head\.", "head.fc."),
        (r"\.attn\.rpb$", ".mixer.position_bias"),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma(\d)$", r".scale\1.gamma"),
    ]
)
_PYRAMID = _KEYS + KeyMap(rename=[(r"^(levels|layers)\.", "stages.")])
_CONV_STEM = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.0\.", "stem.conv1."),
        (r"^patch_embed\.proj\.1\.", "stem.conv2."),
        (r"^patch_embed\.norm\.", "stem.norm2."),
        (r"\.downsample\.reduction\.", ".downsample.conv."),
    ]
)
_PATCH_STEM = KeyMap(rename=[(r"^patch_embed\.norm\.", "stem.norm1.")])

_WHOLE_PATCHES = partial(patch_stem, whole=True)
# Dilations of every other block, by stage: each fills its map, at 224 and at 384 pixels.
_AT_224, _AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)


def _mixers(dilations: Sequence[int] | None, **options: Any) -> Any:
    """Return the mixers: all alike, or in each stage an undilated one and a dilated one in turn."""
    plain = {"name": "na", **options}
    return [{"cycle": [plain, {**plain, "dilation": each}]} for each in dilations] if dilations else plain


def _layout(
    dim: int, heads: int, depth: int, mlp_ratio: float, dilations: Sequence[int] | None = None, **options: Any
) -> Layout:
    layers = {
        "stem_layer": partial(conv_stem, between=False),
        "downsample_layer": partial(ConvDownsample, bias=False),
        "mlp_layer": partial(mlp, mlp_ratio=mlp_ratio),
        "mixer": _mixers(dilations),
    }
    sizes = {"embed_dims": doubled(dim), "num_heads": doubled(heads), "depths": (3, 4, depth, 5)}
    return Layout(Hierarchical, layers | sizes | options, _PYRAMID + _CONV_STEM)


def _dilated(dim: int, heads: int, depth: int, mlp_ratio: float, **options: Any) -> Layout:
    return _layout(dim, heads, depth, mlp_ratio, _AT_224, **options)


def _swin_layout(dim: int, heads: int, depth: int) -> Layout:
    layers = {"stem_layer": _WHOLE_PATCHES, "downsample_layer": PatchMerging, "mlp_layer": mlp}
    sizes = {"embed_dims": doubled(dim), "num_heads": doubled(heads), "depths": (2, 2, depth, 2)}
    return Layout(Hierarchical, layers | sizes | {"mixer": _mixers(_AT_224)}, _PYRAMID + _PATCH_STEM)


def _isotropic(dim: int, heads: int, dilation: int, **options: Any) -> Layout:
    layers = {
        "stem_layer": _WHOLE_PATCHES,
        "mlp_layer": mlp,
        "pos_embed": None,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "mixer": {"cycle": ["na", {"name": "na", "dilation": dilation}]},
    }
    keys = _KEYS + _PATCH_STEM + KeyMap(rename=[(r"^layers\.", "blocks.")])
    return Layout(Plain, layers | {"embed_dim": dim, "num_heads": heads} | options, keys)


_NAT, _DINAT = "https://shi-labs.com/projects/nat/checkpoints", "https://shi-labs.com/projects/dinat/checkpoints"


def _nat_weights(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"{_NAT}/CLS/{file}.pth", top1=top1)}


def _weights(file: str, top1: float | None = None, folder: str = "imagenet1k", **facts: Any) -> Weights:
    return Weights(
        f"{_DINAT}/{folder}/{file}.pth",
        top1=top1,
        paper="arXiv 2209.15001",
        paper_name="Dilated Neighborhood Attention Transformer",
        **facts,
    )


def _in1k(name: str, top1: float, folder: str = "imagenet1k") -> dict[str, Weights]:
    return {"in1k": _weights(f"{name}_in1k_224", top1, folder)}


def _at_384(file: str, top1: float, gmacs: float, mixer: Any) -> Weights:
    return _weights(file, top1, input_size=384, gmacs=gmacs, options={"mixer": mixer})


_LARGE = {
    "in22k_in1k": _weights("dinat_large_in22k_in1k_224", 86.6),
    "in22k_in1k_384": _at_384("dinat_large_in22k_in1k_384", 87.4, 89.7, _mixers(_AT_384)),
    "in22k_in1k_384_11x11": _at_384("dinat_large_in22k_in1k_384_11x11", 87.5, 92.4, _mixers(_AT_224, kernel_size=11)),
    "in22k": _weights("dinat_large_in22k_224", folder="imagenet22k", num_classes=21841),
}
_SWIN_LARGE = {
    "in22k_in1k": _weights("dinat_s_large_in1k_224", 86.5),
    "in22k_in1k_384": _at_384("dinat_s_large_in1k_384", 87.4, 101.5, _mixers(_AT_384)),
    "in22k": _weights("dinat_s_large_in22k_224", folder="imagenet22k", num_classes=21841),
}

VARIANTS = {
    "nat_mini": Variant(_layout(64, 2, 6, 3), _nat_weights("nat_mini", 81.8), 20, 2.7),
    "nat_tiny": Variant(_layout(64, 2, 18, 3), _nat_weights("nat_tiny", 83.2), 28, 4.3),
    "nat_small": Variant(_layout(96, 3, 18, 2, layer_scale=1e-5), _nat_weights("nat_small", 83.7), 51, 7.8),
    "nat_base": Variant(_layout(128, 4, 18, 2, layer_scale=1e-5), _nat_weights("nat_base", 84.3), 90, 13.7),
    "dinat_mini": Variant(_dilated(64, 2, 6, 3), _in1k("dinat_mini", 81.8), 20, 2.7),
    "dinat_tiny": Variant(_dilated(64, 2, 18, 3), _in1k("dinat_tiny", 82.7), 28, 4.3),
    "dinat_small": Variant(_dilated(96, 3, 18, 2), _in1k("dinat_small", 83.8), 51, 7.8),
    "dinat_base": Variant(_dilated(128, 4, 18, 2, layer_scale=1e-5), _in1k("dinat_base", 84.4), 90, 13.7),
    "dinat_large": Variant(_dilated(192, 6, 18, 2), _LARGE, 200, 30.6),
    "dinats_tiny": Variant(_swin_layout(96, 3, 6), _in1k("dinat_s_tiny", 81.8), 28, 4.5),
    "dinats_small": Variant(_swin_layout(96, 3, 18), _in1k("dinat_s_small", 83.5), 50, 8.7),
    "dinats_base": Variant(_swin_layout(128, 4, 18), _in1k("dinat_s_base", 83.8), 88, 15.4),
    "dinats_large": Variant(_swin_layout(192, 6, 18), _SWIN_LARGE, 197, 34.5),
    "nat_isotropic_small": Variant(_isotropic(384, 12, 1), _in1k("nat_isotropic_small", 80.0, "isotropic"), 22, 4.3),
    "nat_isotropic_base": Variant(_isotropic(768, 24, 1), _in1k("nat_isotropic_base", 81.6, "isotropic"), 86, 16.9),
    "dinat_isotropic_small": Variant(
        _isotropic(384, 12, 2), _in1k("dinat_isotropic_small", 80.8, "isotropic"), 22, 4.3
    ),
    "dinat_isotropic_base": Variant(_isotropic(768, 24, 2), _in1k("dinat_isotropic_base", 82.1, "isotropic"), 86, 16.9),
    "test_dinat": Variant(_dilated(16, 1, 2, 2, img_size=96, depths=(2, 1, 2, 1), layer_scale=1e-5)),
    "test_dinat_isotropic": Variant(_isotropic(32, 2, 2, img_size=96, depth=3)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2204.07143", paper_name="Neighborhood Attention Transformer", license="mit"
)
