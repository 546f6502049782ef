"""ViR: ViT with retention in place of attention, causal, from the first patch to a class token after the last.

Source: ViR (Hatamizadeh et al. 2023, arXiv 2310.19731). The mixer is `visionmix.mixers.Retention`. From the paper:
causal retention in three forms, positions added to the patches alone, the class token after the last patch, widths of
ViT. The paper's own repository, NVlabs/ViR, has no code. An anonymous one, anom63931/ViR, calls itself its authors',
without licence or weights. From it: the decays, neither norm nor gate inside the mixer, learned scales that begin at
1e-5, LayerNorm with an epsilon of 1e-6. Outputs equal that code's recurrent and chunkwise forms; its parallel form is
another function (see the mixer). Decided here: `vir_tiny`, which that code does not name, has the width and heads of
DeiT's. The paper's hybrid models and its two-dimensional retention are not here.
"""

from functools import partial
from typing import Any

from visionmix.backbones import Plain
from visionmix.layers import mlp, patch_stem
from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import HEAD

_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^cls_token$", "class_token.weight"),
        (r"^pos_embed$", "pos_embed.weight"),
        (r"\.retention\.out_proj\.", ".mixer.proj."),
        (r"\.retention\.", ".mixer."),
        (r"\.ls([12])\.", r".scale\1."),
        HEAD,
    ]
)


def _layout(dim: int, num_heads: int, depth: int = 12, **options: Any) -> Layout:
    layers = {
        "stem_layer": partial(patch_stem, norm_layer=None),
        "mixer": {"name": "retention", "decays": (5, 9), "head_norm": False},
        "mlp_layer": mlp,
        "prefix_tokens": {"place": "last", "positioned": False},
        "global_pool": "token",
        "layer_scale": 1e-5,
    }
    return Layout(Plain, layers | {"embed_dim": dim, "num_heads": num_heads, "depth": depth} | options, _KEYS)


VARIANTS = {
    "vir_tiny": Variant(_layout(192, 3)),
    "vir_small": Variant(_layout(384, 6)),
    "vir_base": Variant(_layout(768, 12)),
    "test_vir": Variant(_layout(32, 2, depth=3, img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2310.19731", paper_name="ViR: Towards Efficient Vision Retention Backbones"
)
