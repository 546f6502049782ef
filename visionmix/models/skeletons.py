"""Skeletons: pyramids and plain models for any mixer, ``timm.create_model("pyramid_tiny", mixer="mala")``.

They have no published weights. The pyramids have the widths and depths of Swin (Liu et al. 2021, arXiv 2103.14030),
with overlapping convolutions for stem and downsamplers; the plain ones those of DeiT (Touvron et al. 2020, arXiv
2012.12877), without a class token.
"""

from typing import Any

from visionmix.backbones import Hierarchical, Plain
from visionmix.layers import mlp, patch_stem
from visionmix.models import Layout, Variant, register_family
from visionmix.models.hosts import doubled


def _pyramid(dim: int, heads: int, depth: int, **options: Any) -> Variant:
    sizes = {"embed_dims": doubled(dim), "num_heads": doubled(heads), "depths": (2, 2, depth, 2)}
    return Variant(Layout(Hierarchical, {"mixer": "softmax", "mlp_layer": mlp} | sizes | options))


def _plain(dim: int, heads: int, **options: Any) -> Variant:
    layers = {"mixer": "softmax", "mlp_layer": mlp, "stem_layer": patch_stem}
    return Variant(Layout(Plain, layers | {"embed_dim": dim, "num_heads": heads} | options))


VARIANTS = {
    "pyramid_nano": _pyramid(32, 1, 2),
    "pyramid_tiny": _pyramid(96, 3, 6),
    "pyramid_small": _pyramid(96, 3, 18),
    "plain_tiny": _plain(192, 3),
    "plain_small": _plain(384, 6),
    "test_pyramid": _pyramid(16, 1, 1, img_size=96, depths=(1, 1, 2, 1)),
    "test_plain": _plain(32, 2, img_size=96, depth=3),
}

register_family(__name__, VARIANTS, paper="no paper: skeletons of this library", license="apache-2.0")
