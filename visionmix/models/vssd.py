"""VSSD: state-space duality without an order in three stages, softmax attention in the last.

Source: VSSD (Shi et al. 2024, arXiv 2407.18559), whose stem, downsamplers and blocks are those of MILA (Han et al.
2024, arXiv 2405.16605). The mixer is `visionmix.mixers.NonCausalSSD`. The published classifier takes sides that are
multiples of 32; here any size runs, as in the published code for detection. GMACs here include every product of the
mixers; the published ones lie up to 4 % lower, though the published tiny model counts to 4.66 by the same counter.
"""

from collections.abc import Sequence

from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.mila import mila

_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.to_qkv\.", ".mixer.qkv."),
        (r"\.mixer\.(to_out|out_proj)\.", ".mixer.proj."),
        (r"\.mixer\.conv2d\.", ".mixer.conv."),
        (r"\.mixer\.dt_bias$", ".mixer.delta_bias"),
    ]
)


def _layout(dim: int, depths: Sequence[int], heads: int, d_state: int) -> Layout:
    mixer = {"name": "non_causal_ssd", "d_state": d_state}
    return mila(dim, depths, heads, [mixer, mixer, mixer, {"name": "softmax", "qkv_bias": False}]).with_keys(_KEYS)


def _in1k(size: str, top1: float, end: str = "best_ema", mesa: float | None = None) -> dict[str, Weights]:
    def weights(file: str, top1: float) -> Weights:
        return Weights(hf_hub_id="YuhengSSS/VSSD", file=f"vssd_{size}_{file}.pth", top1=top1)

    return {"in1k": weights(end, top1)} | ({"mesa_in1k": weights("e300_with_mesa", mesa)} if mesa else {})


VARIANTS = {
    "vssd_micro": Variant(_layout(48, (2, 2, 8, 4), 2, 48), _in1k("micro", 82.5, "best"), 14, 2.3),
    "vssd_tiny": Variant(_layout(64, (2, 4, 8, 4), 2, 64), _in1k("tiny", 83.6, mesa=84.1), 24, 4.5),
    "vssd_small": Variant(_layout(64, (3, 4, 21, 5), 2, 64), _in1k("small", 84.1, mesa=84.5), 40, 7.4),
    "vssd_base": Variant(_layout(96, (3, 4, 21, 5), 3, 64), _in1k("base", 84.7, mesa=85.4), 89, 16.1),
    "test_vssd": Variant(_layout(16, (1, 1, 1, 1), 1, 8).with_options(img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2407.18559", paper_name="VSSD: Vision Mamba with Non-Causal State Space Duality"
)
