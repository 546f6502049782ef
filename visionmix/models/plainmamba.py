"""PlainMamba: selective scans along snakes at one resolution, with convolutions for a stem and no special tokens.

Source: PlainMamba (Yang et al. 2024, arXiv 2403.17695). The mixer is `visionmix.mixers.PlainScan`.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from visionmix.backbones import Plain
from visionmix.backbones.block import TokenBlock
from visionmix.layers import DeepPatchStem, DepthwiseConvNormAct
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
    sizes = {"embed_dim": dim, "depth": depth, "stem_layer": partial(DeepPatchStem, depth=convs)}
    weights = {"url": f"{_FILES}/{file}"} if file else {}
    return Variant(Plain, _LAYERS | sizes | options, weights, published)


def _local_first(depth: int) -> list:
    """The smallest model's first block ends in a convolution that the whole stream passes, without a residual."""
    return [partial(TokenBlock, tail_layer=DepthwiseConvNormAct)] + [TokenBlock] * (depth - 1)


# The paper's 7.3, 25.7 and 50.5 M parameters are those without the classifier, cut and not rounded: 7.36, 25.76, 50.51.
VARIANTS = {
    "plainmamba_l1": _variant(192, 24, 1, "l1.pth", Published(top1=77.9), block_layer=_local_first(24)),
    "plainmamba_l2": _variant(384, 24, 2, "l2.pth", Published(top1=81.6)),
    "plainmamba_l3": _variant(448, 36, 2, "l3.pth", Published(top1=82.3)),
    "test_plainmamba": _variant(32, 3, 1, img_size=96, block_layer=_local_first(3)),
}


def _conv_or_norm(index: int) -> tuple[int, str]:
    return index // 3, ("conv", "bn")[index % 3]


_NAMES = [
    (r"^backbone\.", ""),
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.stem\.0\.", "stem.conv1."),
    (r"^patch_embed\.stem\.1\.", "stem.norm1."),
    # Convolution, norm and activation follow each other in one list.
    (r"^patch_embed\.convs\.(\d+)\.", lambda match: "stem.convs.{}.{}.".format(*_conv_or_norm(int(match[1])))),
    (r"^patch_embed\.projection\.", "stem.proj."),
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
    return KeyMap(
        rename=_NAMES,
        drop={r"^ema_": "the averaging hook's other copy of the weights; the plain keys have the average"},
        transform=reshape_to(model),
    )


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2403.17695", license="apache-2.0")
