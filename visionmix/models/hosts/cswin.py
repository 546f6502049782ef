"""CSWin: a pyramid with convolutions before every stage, for attention in stripes.

Source: CSWin (Dong et al. 2021, arXiv 2107.00652).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from visionmix.backbones.contract import MixerSpec
from visionmix.layers import PatchStem, mlp

# The published mixers of the four stages: stripes of so many rows or columns, then the whole map.
STRIPES = [{"name": "cross_window", "split_size": size} for size in (1, 2, 7, None)]


def cswin(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mixer: MixerSpec | list[MixerSpec | list[MixerSpec]],
) -> dict[str, Any]:
    """Return the options that make `visionmix.backbones.Hierarchical` a CSWin."""
    return {
        "stem_layer": partial(PatchStem, kernel_size=7, padding=2),
        "mlp_layer": mlp,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        "embed_dims": tuple(embed_dim << stage for stage in range(len(depths))),
        "depths": tuple(depths),
        "num_heads": tuple(num_heads),
        "mixer": mixer,
    }


NAMES = [
    (r"^stage1_conv_embed\.0\.", "stem.conv1."),
    (r"^stage1_conv_embed\.2\.", "stem.norm1."),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"(\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.mixer.\2."),
    (r"\.attns\.0\.get_v\.", ".lepe."),
    (r"\.attns\.1\.get_v\.", ".horizontal_lepe."),
    (r"\.attns\.0\.", "."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
# The files have the kernels of vertical and horizontal stripes apart.
JOIN = {"lepe": ("lepe", "horizontal_lepe")}
