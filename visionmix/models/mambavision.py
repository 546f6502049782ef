"""MambaVision: convolutions in two stages, then selective scans and attention inside windows.

Source: MambaVision (Hatamizadeh and Kautz 2024, arXiv 2407.08083). The mixers are `visionmix.mixers.MambaVisionMixer`
in the first half of a stage's blocks and `SoftmaxAttention` in the second. Written from the paper and what the
published code computes; the weights may not be used commercially. Those tagged in21k began on ImageNet-21k.

A map is cut into windows once, before the first block of a stage: zeros that fill up the last windows take part in all
blocks, as they were trained. At 224 pixels (512 where a tag says so) one window is the whole map. A window keeps its
size whatever the image's. GMACs here include scans and attention; the published ones lie up to 5 % lower. The linear
layers and convolutions of the published tiny model count to 4.46, as many as here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical, Stage
from visionmix.backbones.block import Residual
from visionmix.layers import BatchNorm, ConvDownsample, ConvsDownsample, Stem, StemConv, mlp
from visionmix.mixers.window import into_windows, out_of_windows
from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, doubled
from visionmix.models.keys import NEXT_STAGE

_KEYS = KeyMap(
    rename=[
        (r"^(model|encoder)\.", ""),  # files of the transformers library hold the network as `model`
        (r"^patch_embed\.conv_down\.([03])\.", lambda match: f"stem.conv{int(match[1]) // 3 + 1}."),
        (r"^patch_embed\.conv_down\.([14])\.", lambda match: f"stem.norm{int(match[1]) // 3 + 1}."),
        NEXT_STAGE,
        (r"\.downsample\.reduction\.0\.", ".downsample.conv."),
        (r"^levels\.([01])\.blocks\.(\d+)\.", r"stages.\1.blocks.\2.convs."),
        (r"^levels\.", "stages."),
        (r"\.gamma_(\d)$", r".scale\1.gamma"),
        (r"\.mixer\.(A_log|D|x_proj|dt_proj)\b", r".mixer.scan.\1"),
        (r"\.scan\.dt_proj\.", ".scan.delta_"),
        (r"\.mixer\.out_proj\.", ".mixer.proj."),
        (r"^norm\.", "norm.bn."),
        HEAD,
    ],
    join=[Join(("conv1d_x", "conv1d_z"), "conv")],
    reshape=True,
)


def _stem(in_chans: int, embed_dim: int, patch_size: int, *, width: int = 64, **dd: Any) -> Stem:
    """Return two 3x3 convolutions of stride 2, each with a batch norm and ReLU; the first makes `width` channels."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
    conv = StemConv(width, 3, 2, bias=False, norm_layer=partial(nn.BatchNorm2d, eps=1e-4), act_layer=nn.ReLU)
    return Stem(in_chans, [conv, conv._replace(channels=embed_dim)], **dd)


class _ConvBlock(nn.Module):
    """``x + batch_norm(conv3x3(gelu(batch_norm(conv3x3(x)))))`` with GELU's approximation by tanh, on maps."""

    def __init__(self, dim: int, *, drop_path: float, device: Any, dtype: Any, **_: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        conv = StemConv(dim, 3, norm_layer=nn.BatchNorm2d)
        first = conv._replace(act_layer=partial(nn.GELU, approximate="tanh"))
        self.convs = ConvsDownsample(dim, [first, conv], **dd)
        self.scale1 = Residual(dim, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale1(x, self.convs(x))


class _WindowStage(Stage):
    """`Stage` whose blocks see each window as a map of its own."""

    def __init__(self, *layers: Any, window_size: int, **options: Any) -> None:
        super().__init__(*layers, **options)
        self.window_size = window_size

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        batch, height, width, dim = x.shape
        side = self.window_size
        x = into_windows(x, side).view(-1, side, side, dim)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        # By way of all cells: see `visionmix.mixers.WindowAttention`.
        x = x.contiguous().view(-1, dim).view(batch, -1, dim)
        return self.norm(out_of_windows(x, height, width, side))


class MambaVision(Hierarchical):
    """`Hierarchical` whose last two stages cut their maps into windows.

    Args:
        *args: As `Hierarchical` takes them.
        window_sizes: Rows and columns of a window, in each of the two stages; the weights fit windows of any size.
        **options: As `Hierarchical` takes them, except `stage_layer`.

    Raises:
        ValueError: as `Hierarchical` has it, or `window_sizes` are not two positive numbers.
    """

    def __init__(self, *args: Any, window_sizes: Sequence[int] = (14, 7), **options: Any) -> None:
        if len(window_sizes) != 2 or min(window_sizes) < 1:
            raise ValueError(f"window_sizes={window_sizes!r} must be two positive numbers, of the last two stages")
        stages = [partial(_WindowStage, window_size=size) for size in window_sizes]
        super().__init__(*args, stage_layer=[Stage, Stage, *stages], **options)


def _mixers(depth: int) -> list:
    """Return the mixers of a stage: scans, then, in the smaller half, attention."""
    # bias_scale: as the weights were trained; see the mixer.
    return [{"name": "mamba_vision", "bias_scale": 2.0}] * (depth - depth // 2) + ["softmax"] * (depth // 2)


def _layout(dim: int, depths: Sequence[int], heads: int = 2, **options: Any) -> Layout:
    layers = {
        "stem_layer": _stem,
        "downsample_layer": partial(ConvDownsample, bias=False, norm_layer=nn.Identity),
        "block_layer": [_ConvBlock, _ConvBlock, Block, Block],
        "mixer": ["softmax", "softmax", *map(_mixers, depths[2:])],  # none in the first two stages
        "mlp_layer": mlp,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "final_norm_layer": BatchNorm,
    }
    sizes = {"embed_dims": doubled(dim), "depths": tuple(depths), "num_heads": doubled(heads)}
    return Layout(MambaVision, layers | sizes | options, _KEYS)


def _weights(hub: str, file: str, top1: float, crop_pct: float = 1.0, tag: str = "in1k", **facts: Any) -> dict:
    repository, file = f"nvidia/MambaVision-{hub}", f"mambavision_{file}.pth.tar"
    return {tag: Weights(hf_hub_id=repository, file=file, top1=top1, crop_pct=crop_pct, **facts)}


_in21k = partial(_weights, tag="in21k_in1k")
_at_512 = partial(
    _weights,
    crop_pct=0.93,
    crop_mode="squash",
    tag="in21k_in1k_512",
    input_size=512,
    options={"window_sizes": (32, 16)},
)

_NARROW, _SCALED = {"stem_layer": partial(_stem, width=32)}, {"layer_scale": 1e-5}
_TINY, _TINY2 = _layout(80, (1, 3, 8, 4), **_NARROW), _layout(80, (1, 3, 11, 4), **_NARROW)
_BASE = _layout(128, (3, 3, 10, 5), **_SCALED)
_LARGE, _LARGE2 = _layout(196, (3, 3, 10, 5), 4, **_SCALED), _layout(196, (3, 3, 12, 5), 4, **_SCALED)
_LARGE3 = _layout(256, (3, 3, 20, 10), 4, **_SCALED, window_sizes=(16, 8), img_size=256)
_IN_BASE = _weights("B-1K", "base_1k", 84.2) | _in21k("B-21K", "base_21k", 84.9)
_IN_LARGE = _weights("L-1K", "large_1k", 85.0) | _in21k("L-21K", "large_21k", 86.1)
_IN_LARGE2 = _weights("L2-1K", "large2_1k", 85.3) | _at_512("L2-512-21K", "L2_21k_240m_512", 87.3, gmacs=196.3)
_IN_LARGE3 = _in21k("L3-256-21K", "L3_21k_740m_256", 87.3) | _at_512("L3-512-21K", "L3_21k_740m_512", 88.1, gmacs=489.1)

VARIANTS = {
    "mambavision_tiny": Variant(_TINY, _weights("T-1K", "tiny_1k", 82.3), 31.8, 4.4),
    "mambavision_tiny2": Variant(_TINY2, _weights("T2-1K", "tiny2_1k", 82.7, 0.98), 35.1, 5.1),
    "mambavision_small": Variant(_layout(96, (3, 3, 7, 5)), _weights("S-1K", "small_1k", 83.3, 0.93), 50.1, 7.5),
    "mambavision_base": Variant(_BASE, _IN_BASE, 97.7, 15.0),
    "mambavision_large": Variant(_LARGE, _IN_LARGE, 227.9, 34.9),
    "mambavision_large2": Variant(_LARGE2, _IN_LARGE2, 241.5, 37.5),
    "mambavision_large3": Variant(_LARGE3, _IN_LARGE3, 739.6, 122.3),
    "test_mambavision": Variant(_layout(16, (1, 1, 2, 2), 1, **_SCALED, window_sizes=(4, 2), img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2407.08083",
    paper_name="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
    license="cc-by-nc-sa-4.0",
)
