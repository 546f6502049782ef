"""Swin as a host: global linear attention where the maps are large, windows of softmax attention elsewhere.

The linear attention is global on every map. The published code mixes inside squares as wide as the map's shorter side,
and takes a map that is not square only where they divide it: there its output differs.

Source: Swin (Liu et al. 2021, arXiv 2103.14030).
"""

from collections.abc import Callable, Sequence
from functools import partial

from visionmix.backbones import Hierarchical
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import PatchMerging, mlp, patch_stem
from visionmix.models.hosts import HEAD, doubled, mixers_by_letter
from visionmix.models.keys import NEXT_STAGE, KeyMap
from visionmix.models.layout import Layout

_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^patch_embed\.norm\.", "stem.norm1."),
        NEXT_STAGE,
        (r"^layers\.", "stages."),
        (r"\.relative_position_bias_table$", ".bias_table"),
        (r"\.attn\.", ".mixer."),
        HEAD,
    ],
    drop={
        r"\.relative_position_index$": "which entry of the table stands where, known from the window's size",
        r"\.attn_mask$": "which cells a shift made neighbours, known from the window's and the map's size",
    },
)


def seven_or_twelve(side: int) -> int:
    """Return the window for a first map of `side` cells: 7 up to images of 224 pixels, 12 above, as for 384."""
    return 7 if side <= 56 else 12


def seven_or_eighth(side: int) -> int:
    """Return the window for a first map of `side` cells: an eighth of it, 7 at least; 9 for 288 pixels, 12 for 384."""
    return max(7, side // 8)


def swin(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
    layout: str,
    mixer: Callable[[int], MixerSpec],
    window_size: Callable[[int], int] = seven_or_twelve,
) -> Layout:
    """Return the layout of Swin.

    Args:
        embed_dim: Channels of the first stage; every later one doubles them.
        depths: Blocks of each stage.
        num_heads: Heads of the first stage; every later one doubles them.
        layout: A letter per stage, as `mixers_by_letter` has it. Every other block of a stage, counted from the second
            and whatever is in it, shifts its windows if it has any.
        mixer: Makes the family's own mixer from the stage's number.
        window_size: Gives the softmax blocks' window from the first stage's map, in cells along its shorter side.
    """

    def windows(stage: int) -> list[MixerSpec]:
        size = partial(_window_size, stage=stage, of_first=window_size)
        return [{"name": "window", "window_size": size, "shift": shift} for shift in (False, True)]

    options = {
        "embed_dims": doubled(embed_dim, len(depths)),
        "depths": depths,
        "num_heads": doubled(num_heads, len(depths)),
        "mixer": mixers_by_letter(layout, depths, mixer, windows),
        "stem_layer": patch_stem,
        "downsample_layer": PatchMerging,
        "mlp_layer": mlp,
    }
    return Layout(Hierarchical, options, _KEYS)


def _window_size(grid_size: tuple[int, int], stage: int, of_first: Callable[[int], int]) -> int:
    """Return the window of a stage with a map of `grid_size`; the first stage's is ``2**stage`` times as large."""
    return of_first(min(grid_size) << stage)
