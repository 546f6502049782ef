"""PlainMamba: selective scans along snakes at one resolution, with convolutions for a stem and no special tokens.

Source: PlainMamba (Yang et al. 2024, arXiv 2403.17695). The mixer is `visionmix.mixers.PlainScan`.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Plain
from visionmix.layers import DepthwiseConvNormAct, deep_patch_stem
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family

_KEYS = KeyMap(
    rename=[
        (r"^backbone\.", ""),
        (r"^pos_embed$", "pos_embed.weight"),
        (r"^patch_embed\.stem\.0\.", "stem.conv1."),
        (r"^patch_embed\.stem\.1\.", "stem.norm1."),
        # Convolution, norm and activation follow each other in one list.
        (
            r"^patch_embed\.convs\.(\d+)\.",
            lambda match: f"stem.{('conv', 'norm')[int(match[1]) % 3]}{int(match[1]) // 3 + 2}.",
        ),
        # Version 0.1.0 of this library called the stem's layers otherwise.
        (r"^stem\.convs\.(\d+)\.conv\.", lambda match: f"stem.conv{int(match[1]) + 2}."),
        (r"^stem\.convs\.(\d+)\.bn\.", lambda match: f"stem.norm{int(match[1]) + 2}."),
        (r"^layers\.", "blocks."),
        (r"(\.\d+)\.norm\.", r"\1.norm1."),
        (r"\.dw\.0\.", ".tail.conv."),
        (r"\.dw\.1\.", ".tail.norm."),
        (r"\.mamba\.", ".mixer."),
        (r"\.mixer\.conv2d\.", ".mixer.conv."),
        (r"\.mixer\.out_proj\.", ".mixer.proj."),
        (r"\.mixer\.x_proj\.", ".mixer.scan.x_proj."),
        (r"\.mixer\.dt_proj\.", ".mixer.scan.delta_"),
        (r"\.mixer\.(A_log|D)$", r".mixer.scan.\1"),
        (r"\.mixer\.direction_Bs$", ".mixer.scan.move_B"),
        (r"^ln1\.", "norm."),
    ],
    drop={r"^ema_": "the averaging hook's other copy of the weights; the plain keys have the average"},
    reshape=True,
)
# permute, bias_scale: as the weights were trained; see the mixer.
_MIXER = {"name": "plain_scan", "permute": "input", "bias_scale": 2.0}


def _layout(dim: int, depth: int, convs: int, **options: Any) -> Layout:
    layers = {
        "stem_layer": partial(deep_patch_stem, depth=convs),
        "mixer": _MIXER,
        "mlp_layer": None,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "final_norm_layer": partial(LayerNorm, eps=1e-6),
    }
    last = KeyMap(rename=[(r"^(patch_embed\.projection|stem\.proj)\.", f"stem.conv{convs + 2}.")])
    return Layout(Plain, layers | {"embed_dim": dim, "depth": depth} | options, _KEYS + last)


class _LocalBlock(nn.Module):
    """A block without a feed-forward, followed by a convolution of the whole stream, without a residual."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        block = Block(dim, **options)
        self.norm1, self.mixer, self.scale1 = block.norm1, block.mixer, block.scale1
        self.tail = DepthwiseConvNormAct(dim, device=options["device"], dtype=options["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.scale1(x, self.mixer(self.norm1(x))))


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    url = f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/{file}"
    return {"in1k": Weights(url, top1=top1)}


# The paper's 7.3, 25.7 and 50.5 M parameters leave out the classifier and are truncated: 7.36, 25.76, 50.51.
VARIANTS = {
    "plainmamba_l1": Variant(_layout(192, 24, 1, block_layer=[_LocalBlock, *[Block] * 23]), _in1k("l1.pth", 77.9)),
    "plainmamba_l2": Variant(_layout(384, 24, 2), _in1k("l2.pth", 81.6)),
    "plainmamba_l3": Variant(_layout(448, 36, 2), _in1k("l3.pth", 82.3)),
    "test_plainmamba": Variant(_layout(32, 3, 1, img_size=96, block_layer=[_LocalBlock, Block, Block])),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2403.17695",
    paper_name="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
    license="apache-2.0",
)
