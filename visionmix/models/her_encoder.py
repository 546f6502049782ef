"""HER-Seg's image encoder: MBConv blocks, then dual-gated linear attention, at one resolution.

Source: HER-Seg (Xu et al. 2025, arXiv 2504.06205). The mixer is `visionmix.mixers.DualGatedLinearAttention`. The last
block's map goes to a decoder of masks; there is no classifier unless `num_classes` asks for a fresh one. Of a file of
the pre-training or of a segmentation model, the layers behind the encoder are left out. The published encoder takes
square images of the built size alone, and its authors divide images by ImageNet's mean after subtracting it.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Plain
from visionmix.layers import ConvsDownsample, StemConv, mlp, patch_stem
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family

_MLP_RATIO = 2.0


class _ConvBlock(nn.Module):
    """``gelu(x + convs(x))``: a 1x1, a depthwise 3x3 and a 1x1 convolution with batch norms, GELU between.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        **options: Those of other blocks, of which device and dtype alone have an effect: there is no drop path.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        dd = {"device": options["device"], "dtype": options["dtype"]}
        hidden = int(_MLP_RATIO * dim)
        first = StemConv(hidden, 1, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
        last = first._replace(channels=dim, act_layer=None)
        self.convs = ConvsDownsample(dim, [first, first._replace(kernel_size=3, groups=hidden), last], **dd)
        self.act = nn.GELU()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Let the convolutions add nothing at first, as the published code does."""
        nn.init.zeros_(self.convs.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.convs(x))


def _keys(depths: Sequence[int]) -> KeyMap:
    def block(match: re.Match) -> str:
        return f"blocks.{sum(depths[: int(match[1])]) + int(match[2])}."

    return KeyMap(
        rename=[
            (r"^image_encoder\.", ""),
            (r"^patch_embed\.proj\.", "stem.conv1."),
            (r"^layers\.(\d)\.blocks\.(\d+)\.", block),
            (r"\.conv(\d)\.c\.", r".convs.conv\1."),
            (r"\.conv(\d)\.bn\.", r".convs.norm\1."),
            (r"\.act_proj\.", ".mixer.gate."),
            (r"\.out_proj\.", ".mixer.proj."),
            (r"\.attn\.up_proj\.", ".mixer.value_down."),
            (r"\.attn\.down_proj\.", ".mixer.value_up."),
            (r"\.attn\.", ".mixer."),
        ],
        drop={
            r"\.rope\.rotations$": "the angles of the rotary encoding, which are computed",
            r"^(neck|prompt_encoder|mask_decoder)\.": "the layers behind the encoder",
        },
        lacks={r"^head\.": "an encoder has no classifier"},
    )


def _layout(dim: int, depths: Sequence[int], num_heads: Sequence[int], **options: Any) -> Layout:
    """Return the layout; the first of `depths` counts MBConv blocks, the others those of as many `num_heads`."""
    heads = [count for count, depth in zip(num_heads, depths[1:], strict=True) for _ in range(depth)]
    layers = {
        "embed_dim": dim,
        "depth": sum(depths),
        "mixer": ["dual_gated"] * depths[0] + [{"name": "dual_gated", "num_heads": count} for count in heads],
        "stem_layer": partial(patch_stem, norm_layer=None),
        "block_layer": [_ConvBlock] * depths[0] + [Block] * len(heads),
        "mlp_layer": partial(mlp, mlp_ratio=_MLP_RATIO),
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "final_norm_layer": None,
        "pos_embed": None,
        "num_classes": 0,
    }
    return Layout(Plain, layers | options, _keys(depths))


_SAM = Weights(
    "https://github.com/xq141839/HER-Seg/raw/main/pretrain_weights/SAM_PFD_10K.pth",
    crop_mode="squash",
    num_classes=0,
    std=(0.485, 0.456, 0.406),
)

VARIANTS = {
    "her_encoder": Variant(_layout(96, (2, 2, 6, 2), (6, 12, 24), img_size=1024), {"sam": _SAM}),
    "test_her_encoder": Variant(_layout(16, (1, 1, 1, 1), (2, 4, 8), img_size=96, num_classes=1000)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2504.06205",
    paper_name="HER-Seg: Holistically Efficient Segmentation for High-Resolution Medical Images",
    license="apache-2.0",
)
