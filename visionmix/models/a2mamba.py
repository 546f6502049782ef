"""A2Mamba: attention to windows of two scales whose weights also gather the states of a scan.

Source: A2Mamba (Lou et al. 2025, arXiv 2507.16624). The mixer is `visionmix.mixers.MultiScaleAttentionStates`, in the
layout of SegMAN's encoder. The dilation of its wide windows follows the map, so that logits at another size are those
of the published code there. That code refuses images below 193 pixels, whose last map is smaller than a window. The
weights of windows are computed once for the values and once for the states, where the published code keeps them: 2 to
5 % more multiply-adds. Its own count is 11.4 G for `a2mamba_base`, published as 10.7, and 93.7 M parameters for
`a2mamba_large`, published as 95.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionmix.backbones.block import TwoPositionBlock
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.segman import ScaledBlock, segman

_KEYS = KeyMap(
    rename=[
        (r"\.rpb\.1$", ".position_bias"),
        (r"\.rpb\.2$", ".pair_bias.bias_table"),
        (r"\.mixer\.gate\.0\.", ".mixer.gate."),
        (r"\.mixer\.gate\.1\.", ".mixer.gate_norm.bn."),
        (r"\.mixer\.proj\.0\.", ".mixer.proj_norm."),
        (r"\.mixer\.proj\.1\.", ".mixer.proj."),
    ],
    tied={r"\.position_bias$": "the windows of both scales have one table of biases"},
)
_SCALED = [*[partial(ScaledBlock, initial=1.0)] * 2, *[partial(ScaledBlock, initial=1e-6)] * 2]
_INPUT_SCALED = [*[TwoPositionBlock] * 2, *[partial(ScaledBlock, initial=1.0, of_input=True)] * 2]


def _layout(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    last_ratio: float = 3,
    blocks: Any = TwoPositionBlock,
    kernel_sizes: Sequence[int] = (11, 9, 7, 7),
) -> Layout:
    """Return the layout; `num_heads` counts the heads of both scales, as the published code does."""
    halves = [heads // 2 for heads in num_heads]
    return segman(embed_dims, depths, halves, "mass", kernel_sizes, (4, 4, last_ratio, last_ratio), blocks).with_keys(
        _KEYS
    )


def _in1k(size: str, top1: float, crop_pct: float = 0.9) -> dict[str, Weights]:
    folder = "https://huggingface.co/LMMM2025/A2Mamba/resolve/main/a2mamba_pretrained_weights"
    return {"in1k": Weights(f"{folder}/a2mamba_{size}.pth", top1=top1, crop_pct=crop_pct)}


VARIANTS = {
    "a2mamba_nano": Variant(_layout((32, 64, 128, 192), (2, 2, 8, 2), (2, 2, 4, 8)), _in1k("nano", 78.7), 4, 0.8),
    "a2mamba_tiny": Variant(_layout((48, 96, 256, 448), (2, 2, 10, 2), (2, 4, 8, 16)), _in1k("tiny", 83.0), 15, 2.7),
    "a2mamba_small": Variant(
        _layout((64, 128, 320, 512), (2, 4, 12, 4), (2, 4, 10, 16), blocks=_INPUT_SCALED), _in1k("small", 84.7), 31, 5.4
    ),
    "a2mamba_base": Variant(
        _layout((96, 192, 384, 512), (4, 6, 12, 6), (4, 8, 12, 16), 3.75, _SCALED), _in1k("base", 85.7, 0.95), 51, 10.7
    ),
    "a2mamba_large": Variant(
        _layout((96, 192, 448, 672), (4, 6, 18, 6), (4, 8, 16, 24), 4, _SCALED), _in1k("large", 86.1, 0.975), 95, 17.4
    ),
    "test_a2mamba": Variant(
        _layout(
            (16, 16, 32, 32), (1, 1, 1, 1), (2, 2, 4, 4), blocks=_INPUT_SCALED, kernel_sizes=(3, 5, 3, 3)
        ).with_options(img_size=96)
    ),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2507.16624",
    paper_name="A2Mamba: Attention-augmented State Space Models for Visual Recognition",
)
