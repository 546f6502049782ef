"""Vision-LSTM (ViL): matrix LSTMs along the rows of the map, from the first cell and from the last in turn.

Source: Vision-LSTM (Alkin et al. 2024, arXiv 2406.04303), its second version (the authors' vil2). The mixer is
`visionmix.mixers.MatrixLSTM`. A block here is a pair, one from either end, as in the published code; its rates of
stochastic depth are one for all blocks there and rise to the last one here.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Plain
from visionmix.layers import CornerHead, OffsetLayerNorm, patch_stem
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family

_KEYS = KeyMap(
    rename=[
        # Files name the blocks as the training code did, one after another; the hub's code renames them.
        (r"^xlstm\.blocks\.(\d+)\.xlstm_norm\.", r"xlstm.blocks.\1.norm."),
        (r"^xlstm\.blocks\.(\d+)\.xlstm\.conv1d\.", r"xlstm.blocks.\1.layer.conv."),
        (r"^xlstm\.blocks\.(\d+)\.xlstm\.", r"xlstm.blocks.\1.layer."),
        (
            r"^xlstm\.blocks\.(\d+)\.",
            lambda match: f"blocks.{int(match[1]) // 2}.{('first', 'last')[int(match[1]) % 2]}.",
        ),
        (r"^xlstm\.post_blocks_norm\.", "norm."),
        (r"^xlstm\.", ""),
        (r"^head\.0\.", "head.norm."),
        (r"^head\.1\.", "head.fc."),
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^pos_embed\.embed$", "pos_embed.weight"),
        (r"\.rowwise_from_top_left\.", ".first."),
        (r"\.rowwise_from_bot_right\.", ".last."),
        (r"\.norm\.", ".norm1."),
        (r"^head\.norm1\.", "head.norm."),
        (r"\.layer\.mlstm_cell\.outnorm\.", ".mixer.norm."),
        (r"\.layer\.mlstm_cell\.igate\.", ".mixer.input_gate."),
        (r"\.layer\.mlstm_cell\.fgate\.", ".mixer.forget_gate."),
        (r"\.layer\.proj_up\.", ".mixer.in_proj."),
        (r"\.layer\.proj_down\.", ".mixer.proj."),
        (r"\.layer\.learnable_skip$", ".mixer.skip"),
        (r"\.layer\.", ".mixer."),
        (r"^legacy_norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
)


class _Pair(nn.Module):
    """Two blocks, whose mixers go from the first cell and from the last."""

    def __init__(self, dim: int, *, mixer: Any, **options: Any) -> None:
        super().__init__()
        self.first = Block(dim, mixer=mixer, **options)
        self.last = Block(dim, mixer=partial(mixer, reverse=True), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def _layout(dim: int, depth: int = 12, **options: Any) -> Layout:
    layers = {
        "stem_layer": partial(patch_stem, norm_layer=None),
        "block_layer": _Pair,
        "mixer": "mlstm",
        "mlp_layer": None,
        "num_heads": 4,
        "norm_layer": partial(OffsetLayerNorm, eps=1e-5),
        # As the published models run; they were trained with the two epsilons exchanged.
        "final_norm_layer": partial(OffsetLayerNorm, eps=1e-6),
        "head_layer": partial(CornerHead, corners=2, norm_layer=partial(LayerNorm, eps=1e-5)),
        "global_pool": "corners",
    }
    return Layout(Plain, layers | {"embed_dim": dim, "depth": depth} | options, _KEYS)


def _weights(file: str, top1: float) -> Weights:
    return Weights(f"https://ml.jku.at/research/vision_lstm/download/vil2_{file}_in1k.th", top1=top1, crop_pct=1.0)


_TINY = {"in1k": _weights("tiny16_e800", 78.3), "in1k_e400": _weights("tiny16_e400", 77.2)}

VARIANTS = {
    "vil_tiny": Variant(_layout(192), _TINY, 6, 1.5),
    "vil_small": Variant(_layout(384), {"in1k": _weights("small16_e400", 81.5)}, 23, 5.1),
    "vil_base": Variant(_layout(768), {"in1k": _weights("base16_e400", 82.4)}, 89, 18.6),
    "test_vil": Variant(_layout(32, depth=3, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2406.04303",
    paper_name="Vision-LSTM: xLSTM as Generic Vision Backbone",
    license="mit",
)
