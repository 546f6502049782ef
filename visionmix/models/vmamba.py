"""VMamba: selective scans in four directions, in both of its releases and its first version.

Source: VMamba (Liu et al. 2024, arXiv 2401.10166). A name without a suffix is the release that the paper recommends
(s1l8, s1l20); `_s2l5` and `_s2l15` scan twice the channels in fewer blocks; `_v0` is the first version, with gates, 16
states and no feed-forwards. The mixer is `visionmix.mixers.CrossScan`.
"""

from collections.abc import Sequence
from typing import Any

from visionmix.models import Layout, Variant, Weights, register_family
from visionmix.models.hosts.vmamba import vmamba


def _second(dim: int, depth: int, expand: float) -> Layout:
    return vmamba(dim, (2, 2, depth, 2), {"name": "cross_scan", "expand": expand})


def _first(dim: int, depths: Sequence[int], **options: Any) -> Layout:
    mixer = {"name": "cross_scan", "expand": 2.0, "d_state": 16, "gate": True, "conv_bias": True}
    return vmamba(dim, depths, mixer, patch_merging=True, mlp_layer=None, **options)


def _in1k(file: str, top1: float, release: str = "v2cls") -> dict[str, Weights]:
    url = f"https://github.com/MzeroMiko/VMamba/releases/download/%23{release}/{file}.pth"
    return {"in1k": Weights(url, top1=top1)}


def _v0(file: str, top1: float) -> dict[str, Weights]:
    return _in1k(file, top1, "v0cls")


VARIANTS = {
    "vmamba_tiny": Variant(_second(96, 8, 1.0), _in1k("vssm1_tiny_0230s_ckpt_epoch_264", 82.6), 30, 4.9),
    "vmamba_small": Variant(_second(96, 20, 1.0), _in1k("vssm1_small_0229s_ckpt_epoch_240", 83.3), 49, 8.6),
    "vmamba_base": Variant(_second(128, 20, 1.0), _in1k("vssm1_base_0229s_ckpt_epoch_225", 83.8), 87, 15.2),
    "vmamba_tiny_s2l5": Variant(_second(96, 5, 2.0), _in1k("vssm_tiny_0230_ckpt_epoch_262", 82.5), 31, 4.9),
    "vmamba_small_s2l15": Variant(_second(96, 15, 2.0), _in1k("vssm_small_0229_ckpt_epoch_222", 83.6), 50, 8.7),
    "vmamba_base_s2l15": Variant(_second(128, 15, 2.0), _in1k("vssm_base_0229_ckpt_epoch_237", 83.9), 89, 15.4),
    "vmamba_tiny_v0": Variant(_first(96, (2, 2, 9, 2)), _v0("vssmtiny_dp01_ckpt_epoch_292", 82.2), 23, 5.6),
    "vmamba_small_v0": Variant(_first(96, (2, 2, 27, 2)), _v0("vssmsmall_dp03_ckpt_epoch_238", 83.5), 44, 11.2),
    "vmamba_base_v0": Variant(_first(128, (2, 2, 27, 2)), _v0("vssmbase_dp06_ckpt_epoch_241", 83.7), 76, 18.0),
    "test_vmamba": Variant(_second(16, 2, 1.0).with_options(img_size=96, depths=(1, 1, 2, 1))),
    "test_vmamba_v0": Variant(_first(16, (1, 1, 2, 1), img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2401.10166", paper_name="VMamba: Visual State Space Model", license="mit"
)
