"""Spatial-Mamba: one scan whose states are joined with their neighbours on the map, between position encodings.

Source: Spatial-Mamba (Xiao et al. 2024, arXiv 2410.15091). The mixer is `visionmix.mixers.StateFusion`; stem and
downsamplers are those of MLLA (Han et al. 2024, arXiv 2405.16605).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.backbones.block import TwoPositionBlock
from visionmix.layers import ConvsDownsample, Stem, StemConv, mlp
from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import doubled
from visionmix.models.keys import NEXT_STAGE

_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.conv1\.(conv|norm)\.", r"stem.first.\g<1>1."),
        (
            r"^patch_embed\.conv([23])\.(\d)\.(conv|norm)\.",
            lambda match: f"stem.{'inner' if match[1] == '2' else 'last'}.{match[3]}{int(match[2]) + 1}.",
        ),
        NEXT_STAGE,
        (r"\.downsample\.conv\.(\d)\.(\w+)\.", lambda match: f".downsample.{match[2]}{int(match[1]) + 1}."),
        (r"^layers\.", "stages."),
        (r"\.cpe1\.", ".pos.conv."),
        (r"\.cpe2\.", ".pos2.conv."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.", ".mixer."),
        (r"\.mixer\.conv2d\.", ".mixer.conv."),
        (r"\.mixer\.out_(norm|proj)\.", r".mixer.\1."),
        (r"\.mixer\.x_proj_weight$", ".mixer.scan.x_proj.weight"),
        (r"\.mixer\.dt_projs_", ".mixer.scan.delta_"),
        (r"\.mixer\.A_logs$", ".mixer.scan.A_log"),
        (r"\.mixer\.Ds$", ".mixer.scan.D"),
        (r"\.state_fusion\.", "."),
        (r"^head\.", "head.fc."),
    ],
    join=[Join(("kernel_3", "kernel_3_1", "kernel_3_2"), "filters", torch.stack)],
    reshape=True,
)


class _Stem(nn.Module):
    """Convolutions with batch norms to a fourth of the resolution, two of them around a residual.

    Shapes: (batch, in_chans, height, width) to (batch, ceil(height / 4), ceil(width / 4), embed_dim).
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        if patch_size != 4 or embed_dim % 2:
            raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
        half = embed_dim // 2
        conv = StemConv(half, 3, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)
        self.first = Stem(in_chans, [conv._replace(stride=2)], **dd)
        self.inner = ConvsDownsample(half, [conv, conv._replace(act_layer=None)], **dd)
        wide = conv._replace(channels=4 * embed_dim, stride=2)
        narrow = conv._replace(channels=embed_dim, kernel_size=1, act_layer=None)
        self.last = ConvsDownsample(half, [wide, narrow], **dd)
        self.stride = 4

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        return self.last.grid_size(*self.first.grid_size(height, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.inner(x))


def _downsample(dim: int, out_dim: int, **dd: Any) -> ConvsDownsample:
    """Return a 1x1, a depthwise 3x3 convolution of stride 2 and a 1x1 convolution with a batch norm, ReLU between."""
    wide = 4 * out_dim
    conv = StemConv(wide, 1, act_layer=nn.ReLU)
    last = StemConv(out_dim, 1, norm_layer=nn.BatchNorm2d)
    return ConvsDownsample(dim, [conv, conv._replace(kernel_size=3, stride=2, groups=wide), last], **dd)


def _layout(dim: int, depths: Sequence[int], **options: Any) -> Layout:
    layers = {
        "mixer": "state_fusion",
        "stem_layer": _Stem,
        "downsample_layer": _downsample,
        "block_layer": TwoPositionBlock,
        "mlp_layer": mlp,
        "norm_layer": partial(LayerNorm, eps=1e-5),
    }
    sizes = {"embed_dims": doubled(dim), "depths": tuple(depths)}
    return Layout(Hierarchical, layers | sizes | options, _KEYS, first_conv="stem.first.conv1")


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page=f"https://drive.google.com/file/d/{file}", top1=top1)}


_T, _S, _B = (
    *("19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW", "1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O"),
    "1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM",
)

VARIANTS = {
    "spatial_mamba_tiny": Variant(_layout(64, (2, 4, 8, 4)), _in1k(_T, 83.5), 27, 4.5),
    "spatial_mamba_small": Variant(_layout(64, (2, 4, 21, 5)), _in1k(_S, 84.6), 43, 7.1),
    "spatial_mamba_base": Variant(_layout(96, (2, 4, 21, 5)), _in1k(_B, 85.3), 96, 15.8),
    "test_spatial_mamba": Variant(_layout(16, (1, 1, 2, 1), img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2410.15091",
    paper_name="Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion",
    license="apache-2.0",
)
