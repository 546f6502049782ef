"""Monarch Mixer (M2-ViT): ViT with gated convolutions as long as the sequence and block-diagonal feed-forwards.

Source: Monarch Mixer (Fu et al. 2023, arXiv 2310.12109). The mixer is `visionmix.mixers.MonarchMixer`, the matrices are
those of `visionmix.kernels.monarch`. The paper's repository, HazyResearch/m2, has its language models alone; M2-ViT is
built on the Hyena-ViT of HazyResearch/safari, whose code is public. From the paper: Hyena-ViT-b with block-diagonal
matrices in its feed-forwards, and 45 million parameters, which takes four blocks. From the code of Hyena-ViT: patches
of 16 pixels, neither class token nor position embedding, LayerNorm with an epsilon of 1e-5, the average of all tokens,
and the mixer's sizes. From that of M2: the block-diagonal matrices. Decided here: their biases, which M2's first layers
lack and Hyena-ViT's have; positions that are not learned, where Hyena's code learns those of 1,024 tokens, 0.4 million
numbers, at a rate of 1e-5; `m2_vit_small`, which the paper does not have, with the width of DeiT's.
"""

from functools import partial
from typing import Any

from timm.layers import LayerNorm

from visionmix.backbones import Plain
from visionmix.layers import MonarchMlp, patch_stem
from visionmix.models import Layout, Variant, register_family


def _layout(dim: int, depth: int = 12, **options: Any) -> Layout:
    layers = {
        "stem_layer": partial(patch_stem, norm_layer=None),
        "mixer": "monarch",
        "mlp_layer": MonarchMlp,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "pos_embed": None,
    }
    return Layout(Plain, layers | {"embed_dim": dim, "depth": depth} | options)


# The accuracy that the paper prints, 79.5 %, is of weights that were never published.
VARIANTS = {
    "m2_vit_small": Variant(_layout(384)),
    "m2_vit_base": Variant(_layout(768), params=45),
    "test_m2_vit": Variant(_layout(32, depth=3, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2310.12109",
    paper_name="Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture",
)
