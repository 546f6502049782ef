"""EfficientVMamba: scans that share the cells in the first two stages, MobileNet blocks in the last two.

Source: EfficientVMamba (Pei et al. 2024, arXiv 2403.09977). The mixers are `visionmix.mixers.EfficientScan` and
`InvertedResidualMixer`.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Hierarchical
from visionmix.layers import PatchMerging, patch_stem
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.vmamba import RENAME as VMAMBA_NAMES
from visionmix.models.weights import KeyMap, reshape_to

_NONE = Published()
_NORM = partial(LayerNorm, eps=1e-5)


_LAYERS = {
    "stem_layer": patch_stem,
    "downsample_layer": PatchMerging,
    "mlp_layer": None,
    "mixer": ["efficient_scan", "efficient_scan", "inverted_residual", "inverted_residual"],
    # MobileNet's blocks have norms of their own inside, and none before.
    "norm_layer": [_NORM, _NORM, nn.Identity, nn.Identity],
    "final_norm_layer": _NORM,
}


def _variant(dim: int, depth: int, size: str = "", published: Published = _NONE, **options: Any) -> Variant:
    sizes = {"embed_dims": tuple(dim << stage for stage in range(4)), "depths": (2, 2, depth, 2)}
    page = f"https://huggingface.co/TerryPei/EfficientVMamba-{size}" if size else ""
    return Variant(Hierarchical, _LAYERS | sizes | options, {}, published, page)


VARIANTS = {
    "efficient_vmamba_tiny": _variant(48, 4, "Tiny", Published(6, 0.8, 76.5)),
    # The published configuration of the small model says 96 channels; its training log and its paper have these 64.
    "efficient_vmamba_small": _variant(64, 4, "Small", Published(11, 1.3, 78.7)),
    "efficient_vmamba_base": _variant(96, 9, "Base", Published(33, 4.0, 81.8)),
    "test_efficient_vmamba": _variant(16, 1, img_size=96, depths=(1, 1, 1, 1)),
}

_BRANCHES = [
    (r"(\.blocks\.\d+)\.op\.", r"\1.op.scan."),
    (r"(\.blocks\.\d+)\.conv_branch\.", r"\1.op.conv."),
    (r"(\.blocks\.\d+)\.se\.norm\.", r"\1.op.channel_gate.norm."),
    (r"(\.blocks\.\d+)\.se\.global_reduce\.", r"\1.op.channel_gate.fc1."),
    (r"(\.blocks\.\d+)\.se\.channel_select\.", r"\1.op.channel_gate.fc2."),
    # The last two stages are sequences: a permutation, the blocks, a permutation, the downsampler.
    (r"^layers\.(\d+)\.\d+\.(reduction|norm)\.", r"layers.\1.downsample.\2."),
    (
        r"^layers\.(\d+)\.(\d+)\.(?=conv|se\.)",
        lambda match: f"layers.{match[1]}.blocks.{int(match[2]) - 1}.mixer.block.",
    ),
    (r"\.block\.conv_pw\.0\.", ".block.conv_pw."),
    (r"\.block\.conv_pw\.1\.", ".block.bn1."),
    (r"\.block\.conv_dw\.0\.", ".block.conv_dw."),
    (r"\.block\.conv_dw\.1\.", ".block.bn2."),
    (r"\.block\.conv_pw2\.0\.", ".block.conv_pwl."),
    (r"\.block\.conv_pw2\.1\.", ".block.bn3."),
]
_SCAN = [
    (r"\.mixer\.scan\.conv2d\.", ".mixer.scan.conv."),
    (r"\.mixer\.scan\.out_norm\.", ".mixer.scan.norm."),
    (r"\.mixer\.scan\.out_proj\.", ".mixer.scan.proj."),
    (r"\.mixer\.scan\.x_proj_weight$", ".mixer.scan.scan.x_proj.weight"),
    (r"\.mixer\.scan\.dt_projs_(weight|bias)$", r".mixer.scan.scan.delta_\1"),
    (r"\.mixer\.scan\.A_logs$", ".mixer.scan.scan.A_log"),
    (r"\.mixer\.scan\.Ds$", ".mixer.scan.scan.D"),
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    return KeyMap(rename=[*_BRANCHES, *VMAMBA_NAMES, *_SCAN], transform=reshape_to(model))


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2403.09977", license="apache-2.0")
