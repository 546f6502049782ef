"""FaViT: groups of channels that attend to a smaller map or to the mean of dilated windows, in PVTv2's layout.

Source: FaViT (Qin et al. 2023, arXiv 2312.08614). The mixer is `visionmix.mixers.FactorizedAttention`, with its
`published_mean`, since the published accuracies come of it. No weights are published.
"""

from collections.abc import Sequence

from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import pvt

_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.q\.", ".mixer.query."),
        (r"\.mixer\.norm\.", ".mixer.sr_norm."),
        (r"\.mixer\.kv_g\.", ".mixer.sr_kv."),
        (r"\.mixer\.local_conv_g\.", ".mixer.lepe."),
        (r"\.mixer\.kv_l\.depth_conv\.", ".mixer.local_conv."),
        (r"\.mixer\.kv_l\.point_conv\.", ".mixer.local_proj."),
        (r"\.mixer\.fcs\.(\d)\.", r".mixer.groups.\1.fc."),
        (r"\.mixer\.single_heads\.(\d)\.", r".mixer.groups.\1.kv."),
        (r"\.mixer\.local_convs\.(\d)\.", r".mixer.groups.\1.lepe."),
    ],
    reshape=True,
)


def _layout(dim: int, depths: Sequence[int], sr_ratios: Sequence[int] = (8, 4, 2, 1)) -> Layout:
    mixers = [{"name": "factorized", "sr_ratio": ratio, "published_mean": True} for ratio in sr_ratios]
    dims = [dim << stage for stage in range(4)]
    return pvt.pvt_v2(dims, depths, mixers, (1, 2, 4, 8), (8, 6, 4, 4)).with_keys(_KEYS)


VARIANTS = {
    "favit_b0": Variant(_layout(32, (2, 2, 6, 2)), params=3.4, gmacs=0.6),
    "favit_b1": Variant(_layout(64, (2, 2, 6, 2)), params=13, gmacs=2.4),
    "favit_b2": Variant(_layout(64, (2, 3, 18, 3)), params=24, gmacs=4.5),
    "favit_b3": Variant(_layout(96, (2, 3, 14, 3)), params=48, gmacs=8.5),
    "test_favit": Variant(_layout(16, (1, 1, 1, 1)).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2312.08614",
    paper_name="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
)
