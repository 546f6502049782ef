"""HRVMamba: HRNet's parallel resolutions with selective scans after deformable convolutions.

Source: HRVMamba (Zhang et al. 2024, arXiv 2410.03174). The mixer is `visionmix.mixers.DeformableScan`. The two smaller
models have position encodings from convolutions and squeeze-and-excitation besides; the base model's offsets come from
a depthwise convolution. `features_only=True` gives the maps of all resolutions. Files of pose estimators are not read.
"""

import re
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from visionmix.backbones import Block, Parallel, Residual
from visionmix.layers import ConvPosition
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, doubled
from visionmix.models.hosts.vmamba import SCAN_KEYS

_KERNELS = (3, 5, 7, 9)


class _MultiScaleConv(nn.Module):
    """``gelu(shuffle(cat(depthwise convolutions)))``: a quarter of the channels each by a 3x3, 5x5, 7x7 and 9x9 kernel.

    The shuffle puts the first channels of all quarters first, then their second ones. (batch, height, width, dim) to
    the same.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        if dim % len(_KERNELS):
            raise ValueError(f"dim={dim} has no {len(_KERNELS)} equal parts; give a multiple of {len(_KERNELS)}")
        part = dim // len(_KERNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(part, part, size, padding=size // 2, groups=part, **dd) for size in _KERNELS
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        parts = x.permute(0, 3, 1, 2).chunk(4, dim=1)
        maps = torch.jit.annotate(list[Tensor], [])
        for index, conv in enumerate(self.convs):
            maps.append(conv(parts[index]))
        return self.act(torch.stack(maps, dim=2).flatten(1, 2).permute(0, 2, 3, 1))


class _Block(Block):
    """`Block` behind ``x = x + local(norm0(x))``, a convolution of several scales.

    With `encoded`, a position encoding is added to the input of `local` alone, and one before the feed-forward.
    """

    encoded: Final[bool]

    def __init__(
        self, dim: int, *, encoded: bool = False, device: Any = None, dtype: Any = None, **options: Any
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, **options, **dd)
        self.encoded = encoded
        if encoded:
            self.pos1, self.pos2 = ConvPosition(dim, **dd), ConvPosition(dim, **dd)
        self.norm0 = options["norm_layer"](dim, **dd)
        self.local = _MultiScaleConv(dim, **dd)
        self.scale0 = Residual(dim, options["drop_path"], options["layer_scale"], **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.pos1(x) if self.encoded else x
        x = self.scale0(x, self.local(self.norm0(y)))
        x = self.scale1(x, self.mixer(self.norm1(x)))
        if self.encoded:
            x = x + self.pos2(x)
        return self.scale2(x, self.mlp(self.norm2(x)))


def _layer(number: str) -> str:
    """Return the name in a `Stem` of a convolution or norm, which files number in turn from 0."""
    index = int(number)
    return f"{'norm' if index % 2 else 'conv'}{index // 2 + 1}"


def _entry(match: re.Match) -> str:
    stage = int(match[1]) - 1
    return f"stages.{stage}.enter.{0 if stage else match[2]}.{_layer(match[3])}."


def _path(match: re.Match) -> str:
    target, source = int(match[1]), int(match[2])
    if source > target:
        return f".merges.{target}.up.{source - target - 1}.{_layer(match[3])}."
    step, layer = match[3].split(".")
    return f".merges.{target}.down.{source}.{_layer(str(4 * int(step) + int(layer)))}."


_KEYS = KeyMap(
    rename=[
        HEAD,
        (r"^(conv|bn)(\d)\.", r"stem.convs.\1\2."),
        (r"^layer1\.(\d+)\.", r"stem.blocks.\1."),
        (r"^neck\.increase_layers\.(\d+)\.0\.", r"neck.widen.\1."),
        (r"^neck\.downsample_layers\.(\d+)\.(conv|bn)\.", r"neck.down.\1.\g<2>1."),
        (r"^neck\.final_layer\.(conv|bn)\.", r"neck.last.\g<1>1."),
        (r"^((?:stem\.blocks|neck\.widen)\.\d+)\.(conv|bn)", r"\1.convs.\2"),
        (r"^((?:stem\.blocks|neck\.widen)\.\d+)\.downsample\.(\d)\.", lambda m: f"{m[1]}.shortcut.{_layer(m[2])}."),
        (r"^(stem|neck)\.(.*\.)bn(\d)\.", r"\1.\2norm\3."),
        (r"^transition1\.0\.", "transition1.0.0."),
        (r"^transition(\d)\.(\d)\.0\.(\d)\.", _entry),
        (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 2}.exchanges."),
        (r"\.fuse_layers\.(\d)\.(\d)\.(\d(?:\.\d)?)\.", _path),
        (r"\.cpe(\d)\.", r".pos\1.conv."),
        (r"(\.branches\.\d+\.\d+)\.conv2d\.", r"\1.local.convs."),
        (r"(\.branches\.\d+\.\d+)\.norm\.", r"\1.norm1."),
        (r"\.offset_mask_dw\.", ".around."),
        (r"\.se\.fc\.([02])\.", lambda match: f".se.fc{int(match[1]) // 2 + 1}."),
    ]
)


def _layout(dim: int, stem_dim: int, *, small: bool = False, around: bool = False, **options: Any) -> Layout:
    mixer = {"name": "deformable_scan", "around": around, "se_reduction": 8 if small else None}
    layers = {"mixer": mixer, "block_layer": partial(_Block, encoded=small), "mlp_layer": "mlp", "mlp_ratio": 2.0}
    sizes = {"embed_dims": doubled(dim), "stem_dim": stem_dim, "img_size": 256}
    return Layout(Parallel, layers | sizes | options, _KEYS + SCAN_KEYS, first_conv="stem.convs.conv1")


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page=f"https://drive.google.com/file/d/{file}", top1=top1, crop_pct=1.0)}


_N, _T, _S, _B = (
    *("1vjoEmX8NGh3D4aIB2zTP6eKN23zXmd7i", "18MnK9b-Ip7RLevdAzzPBFNIe_BNHg2Ry"),
    *("1Gxo0Pxg2D7x3dU0P2AZ2YGEFS-7XMxIX", "1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy"),
)

_SMALL = {"embed_dims": (8, 16, 32), "num_exchanges": (1, 1), "depths": (1, 1), "neck_dims": (16, 24, 32, 48)}

VARIANTS = {
    "hrvmamba_nano": Variant(_layout(8, 64, small=True), _in1k(_N, 74.8), 12, 1.9),
    "hrvmamba_tiny": Variant(_layout(16, 128, small=True), _in1k(_T, 78.6), 14, 2.8),
    "hrvmamba_small": Variant(_layout(32, 256), _in1k(_S, 81.3), 20, 5.8),
    "hrvmamba_base": Variant(_layout(80, 256, around=True, img_size=224), _in1k(_B, 84.2), 61, 15.8),
    "test_hrvmamba": Variant(_layout(8, 16, small=True, img_size=96, **_SMALL)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2410.03174",
    paper_name="Efficient High-Resolution Visual Representation Learning with State Space Model for Human Pose "
    "Estimation",
)
