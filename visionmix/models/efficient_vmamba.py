"""EfficientVMamba: scans that divide the cells in the first two stages, MobileNet blocks in the last two.

Source: EfficientVMamba (Pei et al. 2024, arXiv 2403.09977). The mixers are `visionmix.mixers.EfficientScan` and
`InvertedResidualMixer`.
"""

from functools import partial

from timm.layers import LayerNorm
from torch import nn

from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vmamba import vmamba

_NORM = partial(LayerNorm, eps=1e-5)
_BRANCHES = KeyMap(
    rename=[
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
)
_SCAN = KeyMap(
    rename=[
        (r"\.mixer\.scan\.conv2d\.", ".mixer.scan.conv."),
        (r"\.mixer\.scan\.out_norm\.", ".mixer.scan.norm."),
        (r"\.mixer\.scan\.out_proj\.", ".mixer.scan.proj."),
        (r"\.mixer\.scan\.x_proj_weight$", ".mixer.scan.scan.x_proj.weight"),
        (r"\.mixer\.scan\.dt_projs_(weight|bias)$", r".mixer.scan.scan.delta_\1"),
        (r"\.mixer\.scan\.A_logs$", ".mixer.scan.scan.A_log"),
        (r"\.mixer\.scan\.Ds$", ".mixer.scan.scan.D"),
    ]
)


def _layout(dim: int, depth: int) -> Layout:
    mixers = ["efficient_scan", "efficient_scan", "inverted_residual", "inverted_residual"]
    # MobileNet's blocks have norms of their own inside, and none before.
    norms = {"norm_layer": [_NORM, _NORM, nn.Identity, nn.Identity], "final_norm_layer": _NORM}
    host = vmamba(dim, (2, 2, depth, 2), mixers, patch_merging=True, mlp_layer=None, **norms)
    return Layout(host.skeleton, host.options, _BRANCHES + host.keys + _SCAN)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page=f"https://huggingface.co/TerryPei/EfficientVMamba-{size}", top1=top1)}


VARIANTS = {
    "efficient_vmamba_tiny": Variant(_layout(48, 4), _in1k("Tiny", 76.5), 6, 0.8),
    # The published configuration of the small model says 96 channels; its training log and its paper have these 64.
    "efficient_vmamba_small": Variant(_layout(64, 4), _in1k("Small", 78.7), 11, 1.3),
    "efficient_vmamba_base": Variant(_layout(96, 9), _in1k("Base", 81.8), 33, 4.0),
    "test_efficient_vmamba": Variant(_layout(16, 1).with_options(img_size=96, depths=(1, 1, 1, 1))),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2403.09977",
    paper_name="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
    license="apache-2.0",
)
