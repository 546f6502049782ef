"""SegMAN's encoder: attention to a window, then a scan of the map in four directions, in one mixer.

Source: SegMAN (Fu et al. 2024, arXiv 2412.11890). The mixer is `visionmix.mixers.LocalAttentionStates`. The encoders
have the classifier that they were trained with; in segmentation their four maps go to a decoder as they are. The
published classifiers take images of 193 to 224 pixels alone; at other sizes the biases of the last stage are resampled
as in the published code for segmentation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionmix.backbones.block import TwoPositionBlock
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.segman import ScaledBlock, segman

_KEYS = KeyMap(
    rename=[
        (r"\.rpb\.1$", ".pair_bias.bias_table"),
        (r"\.mixer\.dwconv\.0\.", ".mixer.conv."),
        (r"\.mixer\.dwconv\.1\.", ".mixer.conv_norm."),
    ]
)


def _layout(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    last_ratio: float = 3,
    kernel_sizes: Sequence[int] = (11, 9, 7, 7),
    blocks: Any = TwoPositionBlock,
) -> Layout:
    ratios = (4, 4, last_ratio, last_ratio)
    return segman(embed_dims, depths, num_heads, "lass", kernel_sizes, ratios, blocks).with_keys(_KEYS)


_SCALED = partial(ScaledBlock, initial=1e-6)


def _in1k(top1: float, crop_pct: float = 0.9) -> dict[str, Weights]:
    page = "https://drive.google.com/drive/folders/1QYU7nhpe0ddH7bPxI7VH4drc__07uEHs"
    return {"in1k": Weights(page=page, top1=top1, crop_pct=crop_pct)}


VARIANTS = {
    "segman_tiny_encoder": Variant(
        _layout((32, 64, 144, 192), (2, 2, 4, 2), (1, 2, 4, 8), kernel_sizes=(11, 9, 9, 7)), _in1k(76.2)
    ),
    "segman_small_encoder": Variant(_layout((64, 144, 288, 512), (2, 2, 10, 4), (2, 4, 8, 16), 3.4), _in1k(84.0)),
    "segman_base_encoder": Variant(
        _layout((96, 160, 364, 560), (4, 4, 18, 4), (4, 8, 13, 20), blocks=_SCALED), _in1k(85.1, 0.95)
    ),
    "segman_large_encoder": Variant(
        _layout((96, 192, 432, 640), (4, 4, 28, 4), (4, 8, 12, 20), blocks=_SCALED), _in1k(85.5, 0.95)
    ),
    "test_segman_encoder": Variant(
        _layout((16, 16, 32, 32), (1, 1, 1, 1), (1, 1, 2, 2), kernel_sizes=(3, 5, 3, 3), blocks=_SCALED).with_options(
            img_size=96
        )
    ),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2412.11890",
    paper_name="SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention for Semantic "
    "Segmentation",
    license="apache-2.0",
)
