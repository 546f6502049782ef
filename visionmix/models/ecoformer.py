"""EcoFormer: linear attention between binary codes in three stages of PVTv2, softmax attention in the fourth.

Source: EcoFormer (Liu et al. 2022, arXiv 2209.09004). The mixer is `visionmix.mixers.KernelHashAttention`, whose hash
``model.calibrate(images)`` fits to images, once, before training. The published models were trained from PVTv2s with
softmax attention, whose weights are not published.
"""

from collections.abc import Sequence

from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.pvt import pvt_v2

_KEYS = KeyMap(
    rename=[
        (r"\.fast_attention\.ksh\.A$", ".hash.weight"),
        (r"\.fast_attention\.ksh\.mvec$", ".hash.offset"),
        (r"\.fast_attention\.ksh\.anchor$", ".hash.anchors"),
    ],
    drop={r"\.projection_matrix$": "random features of another attention, which the published code never reads"},
    join=[Join(("to_qk", "to_v"), "qv")],
    reshape=True,
)
_SMALL, _MEDIUM = (32, 64, 160, 256), (64, 128, 320, 512)


def _layout(embed_dims: Sequence[int], depths: Sequence[int], **options) -> Layout:
    hashed = {"name": "kernel_hash", "published_sum": True}
    return pvt_v2(embed_dims, depths, [hashed, hashed, hashed, "softmax"]).with_options(**options).with_keys(_KEYS)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    address = f"https://github.com/ziplab/EcoFormer/releases/download/v1.0/pvtv2_{size}_ecoformer.pth"
    return {"in1k": Weights(address, top1=top1)}


VARIANTS = {
    "ecoformer_pvt_v2_b0": Variant(_layout(_SMALL, (2, 2, 2, 2)), _in1k("b0", 70.44)),
    "ecoformer_pvt_v2_b1": Variant(_layout(_MEDIUM, (2, 2, 2, 2)), _in1k("b1", 78.38)),
    "ecoformer_pvt_v2_b2": Variant(_layout(_MEDIUM, (3, 4, 6, 3)), _in1k("b2", 81.28)),
    "ecoformer_pvt_v2_b3": Variant(_layout(_MEDIUM, (3, 4, 18, 3)), _in1k("b3", 81.96)),
    "ecoformer_pvt_v2_b4": Variant(_layout(_MEDIUM, (3, 8, 27, 3)), _in1k("b4", 81.90)),
    "test_ecoformer": Variant(_layout((8, 16, 40, 64), (1, 1, 2, 1), img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2209.09004",
    paper_name="EcoFormer: Energy-Saving Attention with Linear Complexity",
    license="apache-2.0",
)
