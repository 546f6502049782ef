"""Vim as a host: Mamba from both ends at one resolution, with prefix tokens among the patches.

Source: Vim (Zhu et al. 2024, arXiv 2401.09417).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import RmsNorm

from visionmix.backbones import Plain
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import patch_stem
from visionmix.models.keys import KeyMap, split_class_position
from visionmix.models.layout import Layout

_KEYS = KeyMap(
    rename=[
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
    ],
    reshape=True,
)


def vim(
    embed_dim: int,
    depth: int = 24,
    mixer: MixerSpec = "bidirectional_mamba",
    prefix_tokens: str | Mapping[str, Any] = "middle",
    **options: Any,
) -> Layout:
    """Return the layout of Vim, whose classifier reads prefix tokens.

    Files with one class token are taken to hold its position among those of the cells, those with several tokens to
    hold the tokens' positions apart.

    Args:
        embed_dim: Channels of the tokens.
        depth: Number of blocks, which have no feed-forward.
        mixer: The mixer, as the skeleton takes it.
        prefix_tokens: The place of the class token, or several tokens, as the skeleton takes them.
        **options: More options of the skeleton.
    """
    layers = {
        "stem_layer": partial(patch_stem, norm_layer=None),
        "mlp_layer": None,
        "norm_layer": partial(RmsNorm, eps=1e-5),
        "prefix_tokens": prefix_tokens,
        "global_pool": "token",
    }
    together = isinstance(prefix_tokens, str)
    keys = KeyMap(transform=partial(split_class_position, place=prefix_tokens)) if together else KeyMap()
    return Layout(Plain, {"embed_dim": embed_dim, "depth": depth, "mixer": mixer} | layers | options, _KEYS + keys)
