"""NaLaFormer: norm-aware linear attention in its first stages, softmax attention in its later ones.

Source: NaLaFormer (Meng et al. 2025, arXiv 2506.21137), in the layout of MAViT. The mixer is
`visionmix.mixers.NormAwareLinearAttention`. For the smallest model the authors print 8 million parameters and 1.0
GMACs, where their code makes 6.1 and 0.6, and for `nalaformer_t` 2.7 GMACs, where it makes 2.9. They have published no
weights.
"""

from collections.abc import Sequence
from typing import Any

from visionmix.backbones import TwoPositionBlock
from visionmix.layers.stem import Stem, deep_convs
from visionmix.layers.truncated import DrawnConvolutions
from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import DrawnStage
from visionmix.models.hosts.mavit import BASE, LARGE, SMALL, TEST, TINY, Size, mavit

_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.qkvg\.", ".mixer.qkv."),
        (r"\.mixer\.ln\.", ".mixer.norm."),
        (r"\.mixer\.out_proj\.", ".mixer.proj."),
        (r"\.cpe1\.", ".pos.conv."),
        (r"\.cpe2\.", ".pos2.conv."),
    ]
)
_XT = Size((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12))
_SOFTMAX = {"name": "softmax", "rotary": True, "lepe": 5, "gate": True, "gate_norm": True}


class _Stem(DrawnConvolutions, Stem):
    """`visionmix.layers.deep_conv_stem` with these initial weights."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__(in_chans, deep_convs(embed_dim, patch_size), **dd)


def _layout(
    size: Size,
    mlp_ratio: float = 3.5,
    layer_scale: float | Sequence[float] = 1.0,
    hidden_size: int = 1024,
    **options: Any,
) -> Layout:
    layers = {
        "mixer": ["norm_aware", "norm_aware", _SOFTMAX, _SOFTMAX],
        "stem_layer": _Stem,
        "stage_layer": DrawnStage,
        "block_layer": TwoPositionBlock,
        "mlp_ratio": mlp_ratio,
        "layer_scale": layer_scale,
    }
    return mavit("norm_aware", size, hidden_size).with_options(**layers, **options).with_keys(_KEYS)


VARIANTS = {
    "nalaformer_xt": Variant(_layout(_XT), params=8, gmacs=1.0),
    "nalaformer_t": Variant(_layout(TINY, mlp_ratio=4), params=15, gmacs=2.7),
    "nalaformer_s": Variant(_layout(SMALL), params=26, gmacs=5.1),
    "nalaformer_b": Variant(_layout(BASE, mlp_ratio=4, layer_scale=(1.0, 1.0, 1e-6, 1e-6)), params=52, gmacs=12),
    "nalaformer_l": Variant(_layout(LARGE, layer_scale=1e-6), params=95, gmacs=18),
    "test_nalaformer": Variant(_layout(TEST, hidden_size=48, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2506.21137",
    paper_name="Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention",  # noqa: RUF001
    license="mit",
)
