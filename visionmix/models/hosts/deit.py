"""DeiT as a host: one resolution, a class token in front.

Source: DeiT (Touvron et al. 2020, arXiv 2012.12877).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionmix.backbones.contract import MixerSpec
from visionmix.layers import mlp, patch_stem

_STEM = partial(patch_stem, norm_layer=None)

NAMES = [
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^cls_token$", "class_token.weight"),
    (r"^pos_embed$", "pos_embed.weight"),  # cells and class token: see `weights.split_class_position`
    (r"\.attn\.", ".mixer."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def deit(embed_dim: int, num_heads: int, mixers: Sequence[MixerSpec]) -> dict[str, Any]:
    """Return the options of a `Plain` skeleton in the layout of DeiT, with the mixers of its blocks in turn."""
    return {
        "embed_dim": embed_dim,
        "depth": len(mixers),
        "num_heads": num_heads,
        "mixer": list(mixers),
        "prefix_tokens": "first",
        "global_pool": "token",
        "stem_layer": _STEM,
        "mlp_layer": mlp,
    }
