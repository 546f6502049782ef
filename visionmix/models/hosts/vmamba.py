"""VMamba as a host: blocks of a scanning mixer and a feed-forward, in four stages.

Source: VMamba (Liu et al. 2024, arXiv 2401.10166).
"""

from collections.abc import Sequence
from typing import Any

from visionmix.backbones import Hierarchical
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import PatchMerging, mlp, patch_stem
from visionmix.models.hosts import doubled
from visionmix.models.keys import NEXT_STAGE, KeyMap
from visionmix.models.layout import Layout

SCAN_KEYS = KeyMap(
    rename=[
        (r"\.(op|self_attention)\.", ".mixer."),
        (r"\.mixer\.conv2d\.", ".mixer.conv."),
        (r"\.mixer\.out_norm\.", ".mixer.norm."),
        (r"\.mixer\.out_proj\.", ".mixer.proj."),
        (r"\.mixer\.x_proj[._]weight$", ".mixer.scan.x_proj.weight"),
        (r"\.mixer\.dt_projs[._](weight|bias)$", r".mixer.scan.delta_\1"),
        (r"\.mixer\.A_logs$", ".mixer.scan.A_log"),
        (r"\.mixer\.Ds$", ".mixer.scan.D"),
    ],
    reshape=True,
)
"""Keys of the mixers of VMamba's kind, in the files of all its code."""

# Names of the early files (patch_embed.proj, ln_1, self_attention, norm, head), of the released and of the latest code
# are all taken; the last two mean different layers by downsample.1.
_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
        (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        (r"^(classifier\.)?norm\.", "norm."),
        (r"^(classifier\.)?head\.", "head.fc."),
        NEXT_STAGE,
        (r"^layers\.", "stages."),
        (r"(\.blocks\.\d+)\.(norm|ln_1)\.", r"\1.norm1."),
    ]
)
_CONV_DOWNSAMPLE = KeyMap(
    rename=[(r"\.downsample\.1\.", ".downsample.conv."), (r"\.downsample\.3\.", ".downsample.norm.")]
)
_PATCH_MERGING = KeyMap(
    rename=[(r"\.downsample\.1\.", ".downsample.norm."), (r"\.downsample\.2\.", ".downsample.reduction.")]
)


def vmamba(
    embed_dim: int,
    depths: Sequence[int],
    mixer: MixerSpec | list[MixerSpec | list[MixerSpec]],
    *,
    patch_merging: bool = False,
    mlp_layer: Any = mlp,
    **options: Any,
) -> Layout:
    """Return the layout of VMamba.

    Args:
        embed_dim: Channels of the first stage; every later one doubles them.
        depths: Blocks of each stage.
        mixer: The mixers, as the skeleton takes them.
        patch_merging: Whether stem and downsamplers are those of Swin, as in the first version, and no convolutions.
        mlp_layer: The feed-forwards, as the skeleton takes them; the first version has none.
        **options: More options of the skeleton.
    """
    layers = {"stem_layer": patch_stem, "downsample_layer": PatchMerging} if patch_merging else {}
    sizes = {"embed_dims": doubled(embed_dim, len(depths)), "depths": tuple(depths)}
    keys = _KEYS + SCAN_KEYS + (_PATCH_MERGING if patch_merging else _CONV_DOWNSAMPLE)
    return Layout(Hierarchical, {"mixer": mixer, "mlp_layer": mlp_layer} | layers | sizes | options, keys)
