"""NAT and DiNAT: neighborhood attention, dilated in every other block, in pyramids and at one resolution.

Source: NAT (Hassani et al. 2022, arXiv 2204.07143) and DiNAT (Hassani and Shi 2022, arXiv 2209.15001). The mixer is
`visionmix.mixers.NeighborhoodAttention`. `dinats_*` have Swin's stem, downsamplers and widths.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Hierarchical, Plain
from visionmix.layers import ConvDownsample, ConvStem, PatchMerging, PatchStem, mlp
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap

_NONE = Published()
_NORM = partial(LayerNorm, eps=1e-5)
_LINKS = "https://shi-labs.com/projects"
_DINAT = f"{_LINKS}/dinat/checkpoints/imagenet1k"
_WHOLE_PATCHES = partial(PatchStem, whole=True)
_DILATIONS = (8, 4, 2, 1)  # of every other block, by stage: each fills its map at 224 pixels


def _mixers(dilations: Sequence[int] | None) -> Any:
    """Return the mixers: all alike, or in each stage an undilated one and a dilated one in turn."""
    return [["na", {"name": "na", "dilation": each}] for each in dilations] if dilations else "na"


def _weights(address: str) -> dict[str, str]:
    return {"url": address} if address else {}


def _variant(
    dim: int,
    heads: int,
    depth: int,
    mlp_ratio: float,
    address: str = "",
    published: Published = _NONE,
    *,
    dilations: Sequence[int] | None = None,
    **options: Any,
) -> Variant:
    layers = {
        "stem_layer": partial(ConvStem, between=False),
        "downsample_layer": partial(ConvDownsample, bias=False),
        "mlp_layer": partial(mlp, mlp_ratio=mlp_ratio),
        "mixer": _mixers(dilations),
    }
    sizes = {
        "embed_dims": tuple(dim << stage for stage in range(4)),
        "num_heads": tuple(heads << stage for stage in range(4)),
        "depths": (3, 4, depth, 5),
    }
    return Variant(Hierarchical, layers | sizes | options, _weights(address), published)


def _dilated(*arguments: Any, **options: Any) -> Variant:
    return _variant(*arguments, dilations=_DILATIONS, **options)


def _swin_layout(dim: int, heads: int, depth: int, file: str = "", published: Published = _NONE) -> Variant:
    options = {"stem_layer": _WHOLE_PATCHES, "downsample_layer": PatchMerging, "depths": (2, 2, depth, 2)}
    return _dilated(dim, heads, depth, 4.0, f"{_DINAT}/{file}", published, **options)


def _isotropic(
    dim: int, heads: int, dilation: int, file: str = "", published: Published = _NONE, **options: Any
) -> Variant:
    layers = {
        "stem_layer": _WHOLE_PATCHES,
        "mlp_layer": mlp,
        "pos_embed": None,
        "norm_layer": partial(LayerNorm, eps=1e-5),
    }
    mixer = ["na", {"name": "na", "dilation": dilation}]
    address = f"{_LINKS}/dinat/checkpoints/isotropic/{file}" if file else ""
    sizes = {"embed_dim": dim, "num_heads": heads, "mixer": mixer}
    return Variant(Plain, layers | sizes | options, _weights(address), published)


VARIANTS = {
    "nat_mini": _variant(64, 2, 6, 3, f"{_LINKS}/nat/checkpoints/CLS/nat_mini.pth", Published(20, 2.7, 81.8)),
    "nat_tiny": _variant(64, 2, 18, 3, f"{_LINKS}/nat/checkpoints/CLS/nat_tiny.pth", Published(28, 4.3, 83.2)),
    "nat_small": _variant(
        96, 3, 18, 2, f"{_LINKS}/nat/checkpoints/CLS/nat_small.pth", Published(51, 7.8, 83.7), layer_scale=1e-5
    ),
    "nat_base": _variant(
        128, 4, 18, 2, f"{_LINKS}/nat/checkpoints/CLS/nat_base.pth", Published(90, 13.7, 84.3), layer_scale=1e-5
    ),
    "dinat_mini": _dilated(64, 2, 6, 3, f"{_DINAT}/dinat_mini_in1k_224.pth", Published(20, 2.7, 81.8)),
    "dinat_tiny": _dilated(64, 2, 18, 3, f"{_DINAT}/dinat_tiny_in1k_224.pth", Published(28, 4.3, 82.7)),
    "dinat_small": _dilated(96, 3, 18, 2, f"{_DINAT}/dinat_small_in1k_224.pth", Published(51, 7.8, 83.8)),
    "dinat_base": _dilated(
        128, 4, 18, 2, f"{_DINAT}/dinat_base_in1k_224.pth", Published(90, 13.7, 84.4), layer_scale=1e-5
    ),
    "dinat_large": _dilated(192, 6, 18, 2, f"{_DINAT}/dinat_large_in22k_in1k_224.pth", Published(200, 30.6, 86.6)),
    "dinats_tiny": _swin_layout(96, 3, 6, "dinat_s_tiny_in1k_224.pth", Published(28, 4.5, 81.8)),
    "dinats_small": _swin_layout(96, 3, 18, "dinat_s_small_in1k_224.pth", Published(50, 8.7, 83.5)),
    "dinats_base": _swin_layout(128, 4, 18, "dinat_s_base_in1k_224.pth", Published(88, 15.4, 83.8)),
    "dinats_large": _swin_layout(192, 6, 18, "dinat_s_large_in1k_224.pth", Published(197, 34.5, 86.5)),
    "nat_isotropic_small": _isotropic(384, 12, 1, "nat_isotropic_small_in1k_224.pth", Published(22, 4.3, 80.0)),
    "nat_isotropic_base": _isotropic(768, 24, 1, "nat_isotropic_base_in1k_224.pth", Published(86, 16.9, 81.6)),
    "dinat_isotropic_small": _isotropic(384, 12, 2, "dinat_isotropic_small_in1k_224.pth", Published(22, 4.3, 80.8)),
    "dinat_isotropic_base": _isotropic(768, 24, 2, "dinat_isotropic_base_in1k_224.pth", Published(86, 16.9, 82.1)),
    "test_dinat": _dilated(16, 1, 2, 2, img_size=96, depths=(2, 1, 2, 1), layer_scale=1e-5),
    "test_dinat_isotropic": _isotropic(32, 2, 2, img_size=96, depth=3),
}

_NAMES = [
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^head\.", "head.fc."),
    (r"\.attn\.rpb$", ".mixer.position_bias"),
    (r"\.attn\.", ".mixer."),
    (r"\.gamma(\d)$", r".scale\1.gamma"),
]
# The published code ends a stage with its downsampler; here the next stage begins with it.
_DOWNSAMPLE = (r"^(levels|layers)\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[2]) + 1}.downsample.")


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    if isinstance(model, Plain):
        stem = [(r"^patch_embed\.proj\.(?=[a-z])", "stem.conv1."), (r"^patch_embed\.norm\.", "stem.norm1.")]
        return KeyMap(rename=[*stem, *_NAMES, (r"^layers\.", "blocks.")])
    stages = [_DOWNSAMPLE, (r"^(levels|layers)\.", "stages.")]
    if isinstance(model.stem, PatchStem):
        stem = [(r"^patch_embed\.proj\.(?=[a-z])", "stem.conv1."), (r"^patch_embed\.norm\.", "stem.norm1.")]
        return KeyMap(rename=[*stem, *_NAMES, *stages])
    conv = [(r"^patch_embed\.norm\.", "stem.norm2."), (r"\.downsample\.reduction\.", ".downsample.conv.")]
    return KeyMap(rename=[*_NAMES, *stages, *conv])


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2204.07143, 2209.15001", license="mit")
