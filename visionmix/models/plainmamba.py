"""PlainMamba: selective scans along snakes at one resolution, with convolutions for a stem and no special tokens.

Source: PlainMamba (Yang et al. 2024, arXiv 2403.17695). The mixer is `visionmix.mixers.PlainScan`.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Plain
from visionmix.layers import DepthwiseConv, deep_patch_stem
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap, reshape_to

_NONE = Published()
_FILES = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main"
# permute, bias_scale: what the weights were trained with; see the mixer.
_MIXER = {"name": "plain_scan", "permute": "input", "bias_scale": 2.0}
_LAYERS = {
    "mixer": _MIXER,
    "mlp_layer": None,
    "norm_layer": partial(LayerNorm, eps=1e-5),
    "final_norm_layer": partial(LayerNorm, eps=1e-6),
}


def _variant(dim: int, depth: int, convs: int, file: str = "", published: Published = _NONE, **options: Any) -> Variant:
    sizes = {"embed_dim": dim, "depth": depth, "stem_layer": partial(deep_patch_stem, depth=convs)}
    weights = {"url": f"{_FILES}/{file}"} if file else {}
    return Variant(Plain, _LAYERS | sizes | options, weights, published)


class _LocalBlock(nn.Module):
    """A block without a feed-forward and, behind it, a convolution that the whole stream passes, without a residual."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        block = Block(dim, **options)
        self.norm1, self.mixer, self.scale1 = block.norm1, block.mixer, block.scale1
        self.tail = DepthwiseConv(dim, device=options["device"], dtype=options["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.scale1(x, self.mixer(self.norm1(x))))


# The paper's 7.3, 25.7 and 50.5 M parameters are those without the classifier, cut and not rounded: 7.36, 25.76, 50.51.
VARIANTS = {
    "plainmamba_l1": _variant(192, 24, 1, "l1.pth", Published(top1=77.9), block_layer=[_LocalBlock, *[Block] * 23]),
    "plainmamba_l2": _variant(384, 24, 2, "l2.pth", Published(top1=81.6)),
    "plainmamba_l3": _variant(448, 36, 2, "l3.pth", Published(top1=82.3)),
    "test_plainmamba": _variant(32, 3, 1, img_size=96, block_layer=[_LocalBlock, Block, Block]),
}


_NAMES = [
    (r"^backbone\.", ""),
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.stem\.0\.", "stem.conv1."),
    (r"^patch_embed\.stem\.1\.", "stem.norm1."),
    # Convolution, norm and activation follow each other in one list.
    (
        r"^patch_embed\.convs\.(\d+)\.",
        lambda match: f"stem.{('conv', 'norm')[int(match[1]) % 3]}{int(match[1]) // 3 + 2}.",
    ),
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
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    last = max(name for name, _ in model.stem.named_children() if name.startswith("conv"))
    return KeyMap(
        rename=[*_NAMES, (r"^(patch_embed\.projection|stem\.proj)\.", f"stem.{last}.")],
        drop={r"^ema_": "the averaging hook's other copy of the weights; the plain keys have the average"},
        transform=reshape_to(model),
    )


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2403.17695", license="apache-2.0")
