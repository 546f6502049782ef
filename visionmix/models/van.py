"""VAN: gates made by depthwise convolutions of a large reach, with batch norms, in PVTv2's layout.

Source: Visual Attention Network (Guo et al. 2022, arXiv 2202.09741). The mixer is
`visionmix.mixers.LargeKernelAttention`. Images are normalised by a mean and deviation of 0.5, timm's for ViT at the
authors' time. B5 and B6 were trained on ImageNet-22k first. B2 to B6 are compared with the published code at fewer
blocks: under the weights of that comparison every block squares its input, and whole models overflow.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Stage
from visionmix.layers import BatchNorm, ConvDownsample, Stem, StemConv
from visionmix.layers.fan_out import draw_by_fan_out
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.pvt import pvt_v2

_KEYS = KeyMap(
    rename=[
        (r"\.downsample\.norm\.", ".downsample.norm.bn."),
        (r"(\.blocks\.\d+\.norm\d)\.", r"\1.bn."),
        (r"\.layer_scale_(\d)$", r".scale\1.gamma"),
        (r"\.mixer\.proj_1\.", ".mixer.proj_in."),
        (r"\.mixer\.proj_2\.", ".mixer.proj."),
        (r"\.spatial_gating_unit\.conv0\.", ".conv."),
        (r"\.spatial_gating_unit\.conv_spatial\.", ".dilated."),
        (r"\.spatial_gating_unit\.conv1\.", ".gate."),
    ],
    reshape=True,
)


class _DrawnByFanOut:
    """Everything but the classifier begins as convolutions do, 1x1 convolutions that are linear layers here too."""

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw all convolutions and linear layers inside by their fan-out."""
        for layer in self.modules():
            draw_by_fan_out(layer)


class _Stem(_DrawnByFanOut, Stem):
    """A 7x7 convolution of a patch's stride and a batch norm."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__(in_chans, [StemConv(embed_dim, 7, patch_size, norm_layer=nn.BatchNorm2d)], **dd)


class _Stage(_DrawnByFanOut, Stage):
    """`Stage` with these initial weights."""


def _layout(embed_dims: Sequence[int], depths: Sequence[int], **options: Any) -> Layout:
    layers = {
        "stem_layer": _Stem,
        "downsample_layer": partial(ConvDownsample, norm_layer=BatchNorm),
        "stage_layer": _Stage,
        "norm_layer": BatchNorm,
        "stage_norm_layer": partial(LayerNorm, eps=1e-6),
        "layer_scale": 1e-2,
    }
    return pvt_v2(embed_dims, depths, "lka").with_options(**layers, **options).with_keys(_KEYS)


_HUB = "Visual-Attention-Network/VAN-{}-original"
_PAGE = "https://cloud.tsinghua.edu.cn/d/0100f0cea37d41ba8d08/"  # of all the authors' pre-trained models
_TESTED = {"crop_pct": 0.9, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    file = f"van_{size.lower()}_{10 * top1:.0f}.pth.tar"
    return {"in1k": Weights(hf_hub_id=_HUB.format(size), file=file, top1=top1, **_TESTED)}


_SMALL, _MEDIUM = (32, 64, 160, 256), (64, 128, 320, 512)

VARIANTS = {
    "van_b0": Variant(_layout(_SMALL, (3, 3, 5, 2)), _in1k("Tiny", 75.4), 4.1, 0.9),
    "van_b1": Variant(_layout(_MEDIUM, (2, 2, 4, 2)), _in1k("Small", 81.1), 13.9, 2.5),
    "van_b2": Variant(_layout(_MEDIUM, (3, 3, 12, 3)), _in1k("Base", 82.8), 26.6, 5.0),
    "van_b3": Variant(_layout(_MEDIUM, (3, 5, 27, 3)), _in1k("Large", 83.9), 44.8, 9.0),
    # Parameters, multiply-adds and accuracy as OpenMMLab's documentation of VAN has them.
    "van_b4": Variant(
        _layout(_MEDIUM, (3, 6, 40, 3)), {"in1k": Weights(page=_PAGE, top1=84.1, **_TESTED)}, 60.28, 12.22
    ),
    "van_b5": Variant(_layout((96, 192, 480, 768), (3, 3, 24, 3))),
    "van_b6": Variant(_layout((96, 192, 384, 768), (6, 6, 90, 6))),
    "test_van": Variant(_layout((8, 16, 40, 64), (1, 1, 2, 1), img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2202.09741", paper_name="Visual Attention Network", license="apache-2.0"
)
