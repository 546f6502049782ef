"""CSWin as a host: convolutions before every stage, softmax attention in stripes or a mixer over the whole map.

Source: CSWin (Dong et al. 2021, arXiv 2107.00652).
"""

from collections.abc import Callable, Sequence
from functools import partial

from visionmix.backbones import Hierarchical
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import ConvDownsample, mlp, patch_stem
from visionmix.models.hosts import HEAD, doubled, mixers_by_letter
from visionmix.models.keys import KeyMap, shifted
from visionmix.models.layout import Layout

_KEYS = KeyMap(
    rename=[
        (r"^stage1_conv_embed\.0\.", "stem.conv1."),
        (r"^stage1_conv_embed\.2\.", "stem.norm1."),
        (r"^merge(\d)\.", r"stages.\1.downsample."),
        (r"^stage(\d)\.", shifted("stages.{}.blocks.", -1)),
        (r"(\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.mixer.\2."),
        (r"\.attns\.0\.get_v\.", ".conv."),
        (r"\.attns\.1\.get_v\.", ".horizontal_conv."),
        (r"\.attns\.0\.", "."),
        HEAD,
    ]
)


def _half_the_map(grid_size: tuple[int, int]) -> int:
    """Return half of the map's side: 7 for images of 224 pixels, 12 for 384, as published."""
    return max(1, min(grid_size) // 2)


_STRIPES = (1, 2, _half_the_map, None)


def cswin(
    embed_dim: int, depths: Sequence[int], num_heads: int, layout: str, mixer: Callable[[int], MixerSpec]
) -> Layout:
    """Return the layout of CSWin.

    Args:
        embed_dim: Channels of the first stage; every later one doubles them.
        depths: Blocks of each stage.
        num_heads: Heads of the first stage; every later one doubles them.
        layout: A letter per stage, as `mixers_by_letter` has it.
        mixer: Makes the family's own mixer from the stage's number.
    """

    def stripes(stage: int) -> list[MixerSpec]:
        return [{"name": "cross_window", "split_size": _STRIPES[stage]}]

    options = {
        "embed_dims": doubled(embed_dim, len(depths)),
        "depths": depths,
        "num_heads": doubled(num_heads, len(depths)),
        "mixer": mixers_by_letter(layout, depths, mixer, stripes),
        "stem_layer": partial(patch_stem, kernel_size=7, padding=2),
        "downsample_layer": ConvDownsample,
        "mlp_layer": mlp,
    }
    return Layout(Hierarchical, options, _KEYS)
