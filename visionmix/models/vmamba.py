"""VMamba: selective scans in four directions, in its released, second and first versions.

Source: VMamba (Liu et al. 2024, arXiv 2401.10166). A name without a suffix is the release that the paper recommends
(s1l8, s1l20); `_s2l5` and `_s2l15` scan twice the channels in fewer blocks; `_v0` is the first version, with gates, 16
states and no feed-forwards. The mixer is `visionmix.mixers.CrossScan`.
"""

from typing import Any

from torch import nn

from visionmix.backbones import Hierarchical
from visionmix.layers import PatchMerging, PatchStem, mlp
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap, reshape_to

_NONE = Published()
_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"


def _variant(
    dim: int, depth: int, expand: float, file: str = "", published: Published = _NONE, **options: Any
) -> Variant:
    return Variant(
        Hierarchical,
        {"mixer": {"name": "cross_scan", "expand": expand}, "mlp_layer": mlp} | _sizes(dim, depth) | options,
        {"url": f"{_RELEASES}/%23v2cls/{file}"} if file else {},
        published,
    )


def _first_version(dim: int, depth: int, file: str = "", published: Published = _NONE, **options: Any) -> Variant:
    layers = {"stem_layer": PatchStem, "downsample_layer": PatchMerging, "mlp_layer": None}
    mixer = {"name": "cross_scan", "expand": 2.0, "d_state": 16, "gate": True, "conv_bias": True}
    return Variant(
        Hierarchical,
        {"mixer": mixer} | layers | _sizes(dim, depth) | options,
        {"url": f"{_RELEASES}/%23v0cls/{file}"} if file else {},
        published,
    )


def _sizes(dim: int, depth: int) -> dict[str, Any]:
    return {"embed_dims": tuple(dim << stage for stage in range(4)), "depths": (2, 2, depth, 2)}


VARIANTS = {
    "vmamba_tiny": _variant(96, 8, 1.0, "vssm1_tiny_0230s_ckpt_epoch_264.pth", Published(30, 4.9, 82.6)),
    "vmamba_small": _variant(96, 20, 1.0, "vssm1_small_0229s_ckpt_epoch_240.pth", Published(49, 8.6, 83.3)),
    "vmamba_base": _variant(128, 20, 1.0, "vssm1_base_0229s_ckpt_epoch_225.pth", Published(87, 15.2, 83.8)),
    "vmamba_tiny_s2l5": _variant(96, 5, 2.0, "vssm_tiny_0230_ckpt_epoch_262.pth", Published(31, 4.9, 82.5)),
    "vmamba_small_s2l15": _variant(96, 15, 2.0, "vssm_small_0229_ckpt_epoch_222.pth", Published(50, 8.7, 83.6)),
    "vmamba_base_s2l15": _variant(128, 15, 2.0, "vssm_base_0229_ckpt_epoch_237.pth", Published(89, 15.4, 83.9)),
    "vmamba_tiny_v0": _first_version(96, 9, "vssmtiny_dp01_ckpt_epoch_292.pth", Published(23, 5.6, 82.2)),
    "vmamba_small_v0": _first_version(96, 27, "vssmsmall_dp03_ckpt_epoch_238.pth", Published(44, 11.2, 83.5)),
    "vmamba_base_v0": _first_version(128, 27, "vssmbase_dp06_ckpt_epoch_241.pth", Published(76, 18.0, 83.7)),
    "test_vmamba": _variant(16, 2, 1.0, img_size=96, depths=(1, 1, 2, 1)),
    "test_vmamba_v0": _first_version(16, 2, img_size=96, depths=(1, 1, 2, 1)),
}

_STEM_AND_HEAD = [
    (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
    (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^(classifier\.)?norm\.", "norm."),
    (r"^(classifier\.)?head\.", "head.fc."),
]
# The published code ends a stage with its downsampler; here the next stage begins with it.
_DOWNSAMPLE = (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.")
_BLOCK = [
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.(norm|ln_1)\.", r"\1.norm1."),
    (r"\.(op|self_attention)\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.out_norm\.", ".mixer.norm."),
    (r"\.mixer\.out_proj\.", ".mixer.proj."),
    (r"\.mixer\.x_proj[._]weight$", ".mixer.scan.x_proj.weight"),
    (r"\.mixer\.dt_projs[._](weight|bias)$", r".mixer.scan.delta_\1"),
    (r"\.mixer\.A_logs$", ".mixer.scan.A_log"),
    (r"\.mixer\.Ds$", ".mixer.scan.D"),
]
# Names of the early files (patch_embed.proj, ln_1, self_attention, norm, head), of the released and of the latest code
# are all taken; the last two mean different layers by downsample.1.
RENAME = [*_STEM_AND_HEAD, _DOWNSAMPLE, *_BLOCK]
_CONV_DOWNSAMPLE = [(r"\.downsample\.1\.", ".downsample.conv."), (r"\.downsample\.3\.", ".downsample.norm.")]
_PATCH_MERGING = [(r"\.downsample\.1\.", ".downsample.norm."), (r"\.downsample\.2\.", ".downsample.reduction.")]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    downsample = _PATCH_MERGING if isinstance(model.stem, PatchStem) else _CONV_DOWNSAMPLE
    return KeyMap(rename=RENAME + downsample, transform=reshape_to(model))


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2401.10166", license="mit")
