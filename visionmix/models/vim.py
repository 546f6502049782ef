"""Vision Mamba: a class token in the middle of the patches, and Mamba from both ends.

Source: Vim (Zhu et al. 2024, arXiv 2401.09417), the released weights with the class token in the middle; `_stride8` are
its models of overlapping patches (Vim-Ti+, Vim-S+). The mixer is `visionmix.mixers.BidirectionalMamba`.
"""

from functools import partial
from typing import Any

from timm.layers import RmsNorm
from torch import Tensor, nn

from visionmix.backbones import Plain
from visionmix.layers import patch_stem
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap, reshape_to, split_class_position

_NONE = Published()
_LAYERS = {
    "depth": 24,
    "stem_layer": partial(patch_stem, norm_layer=None),
    "mixer": "bidirectional_mamba",
    "mlp_layer": None,
    "norm_layer": partial(RmsNorm, eps=1e-5),
    "prefix_tokens": "middle",
    "global_pool": "token",
}


def _variant(dim: int, size: str = "", file: str = "", published: Published = _NONE, **options: Any) -> Variant:
    weights = {"hf_hub_id": f"hustvl/Vim-{size}-midclstok", "hf_hub_filename": file} if file else {}
    return Variant(Plain, _LAYERS | {"embed_dim": dim} | options, weights, published)


VARIANTS = {
    "vim_tiny": _variant(192, "tiny", "vim_t_midclstok_76p1acc.pth", Published(7, None, 76.1)),
    "vim_small": _variant(384, "small", "vim_s_midclstok_80p5acc.pth", Published(26, None, 80.5)),
    "vim_base": _variant(768, "base", "vim_b_midclstok_81p9acc.pth", Published(98, None, 81.9)),
    "vim_tiny_stride8": _variant(192, "tiny", "vim_t_midclstok_ft_78p3acc.pth", Published(7, None, 78.3), stride=8),
    "vim_small_stride8": _variant(384, "small", "vim_s_midclstok_ft_81p6acc.pth", Published(26, None, 81.6), stride=8),
    "test_vim_tiny": _variant(32, depth=3, img_size=96),
}

_NAMES = [
    (r"^cls_token$", "class_token.weight"),
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^layers\.", "blocks."),
    (r"(\.\d+)\.norm\.", r"\1.norm1."),
    (r"^norm_f\.", "norm."),
    (r"^head\.", "head.fc."),
    (r"\.mixer\.out_proj\.", ".mixer.proj."),
    (r"\.mixer\.A_b_log$", ".mixer.A_log_b"),
    (r"\.mixer\.(A_log|D|conv1d|x_proj|dt_proj)_b\b", r".mixer.backward_scan.\1"),
    (r"\.mixer\.(A_log|D|conv1d|x_proj|dt_proj)\b", r".mixer.forward_scan.\1"),
    (r"_scan\.conv1d\.", "_scan.conv."),
    (r"_scan\.dt_proj\.", "_scan.delta_"),
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    reshape = reshape_to(model)

    def transform(key: str, tensor: Tensor) -> Tensor | dict[str, Tensor]:
        return split_class_position(key, reshape(key, tensor), "middle")

    return KeyMap(rename=_NAMES, transform=transform)


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2401.09417", license="apache-2.0")
