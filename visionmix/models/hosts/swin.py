"""Swin as a host: global linear attention where the maps are large, windows of softmax attention elsewhere.

The linear attention is global on every map. The published code mixes inside squares as wide as the map's shorter side,
and takes a map that is not square only where they divide it: there its output differs.

Source: Swin (Liu et al. 2021, arXiv 2103.14030).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from visionmix.backbones.contract import MixerSpec
from visionmix.layers import PatchMerging, mlp, patch_stem
from visionmix.models.hosts import mixers_by_letter

NAMES = [
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.norm\.", "stem.norm1."),
    # The published code ends a stage with its downsampler; here the next stage begins with it.
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.relative_position_bias_table$", ".bias_table"),
    (r"\.attn\.", ".mixer."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
DROP = {
    r"\.relative_position_index$": "which entry of the table stands where, known from the window's size",
    r"\.attn_mask$": "which cells a shift made neighbours, known from the window's and the map's size",
}


def swin(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
    layout: str,
    mixer: Callable[[int], MixerSpec],
    window_size: Callable[[int], int],
) -> dict[str, Any]:
    """Return the options of a `Hierarchical` skeleton in the layout of Swin.

    Args:
        embed_dim: Channels of the first stage; every later one doubles them.
        depths: Blocks of each stage.
        num_heads: Heads of the first stage; every later one doubles them.
        layout: A letter a stage, as `mixers_by_letter` has it. Every other block of a stage, counted from the second
            and whatever is in it, shifts its windows if it has any.
        mixer: Makes the family's own mixer from the stage's number.
        window_size: Gives the softmax blocks' window from the first stage's map, in cells along its shorter side.
    """

    def window(stage: int, block: int) -> MixerSpec:
        size = partial(_window_size, stage=stage, of_first=window_size)
        return {"name": "window", "window_size": size, "shift": block % 2 == 1}

    return {
        "embed_dims": tuple(embed_dim << stage for stage in range(len(depths))),
        "depths": depths,
        "num_heads": tuple(num_heads << stage for stage in range(len(depths))),
        "mixer": mixers_by_letter(layout, depths, mixer, window),
        "stem_layer": patch_stem,
        "downsample_layer": PatchMerging,
        "mlp_layer": mlp,
    }


def _window_size(grid_size: tuple[int, int], stage: int, of_first: Callable[[int], int]) -> int:
    """Return the window of a stage with a map of `grid_size`; the first stage's is ``2**stage`` times as large."""
    return of_first(min(grid_size) << stage)
