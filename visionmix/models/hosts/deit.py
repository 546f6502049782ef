"""DeiT as a host: one resolution, a class token in front.

Source: DeiT (Touvron et al. 2020, arXiv 2012.12877).
"""

from collections.abc import Sequence
from functools import partial

from visionmix.backbones import Plain
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import mlp, patch_stem
from visionmix.models.hosts import HEAD
from visionmix.models.keys import KeyMap, split_class_position
from visionmix.models.layout import Layout

_STEM = partial(patch_stem, norm_layer=None)
_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^cls_token$", "class_token.weight"),
        (r"^pos_embed$", "pos_embed.weight"),
        (r"\.attn\.", ".mixer."),
        HEAD,
    ],
    transform=split_class_position,
)


def deit(embed_dim: int, num_heads: int, mixers: Sequence[MixerSpec]) -> Layout:
    """Return the layout of DeiT, with the mixers of its blocks in turn."""
    options = {
        "embed_dim": embed_dim,
        "depth": len(mixers),
        "num_heads": num_heads,
        "mixer": list(mixers),
        "prefix_tokens": "first",
        "global_pool": "token",
        "stem_layer": _STEM,
        "mlp_layer": mlp,
    }
    return Layout(Plain, options, _KEYS)
