"""pLSTM-Vis: linear recurrences on the grid of patches, from its four corners, that spread (P) and turn (D) in turn.

Source: pLSTM (Pöppel et al. 2025, arXiv 2506.11997), without layer scale. The mixer is `visionmix.mixers.PLSTM`. The
published PyTorch code takes grids that are nearly square; every grid runs here. The models were trained in JAX, with
the tanh form of GELU: ``mlp_layer=dict(name="mlp", act_layer="gelu_tanh")`` suits weights converted from there.
"""

from functools import partial
from typing import Any

from timm.layers import RmsNorm

from visionmix.backbones import Plain
from visionmix.layers import CornerHead, mlp, patch_stem
from visionmix.models import Join, KeyMap, Layout, Variant, register_family

_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^pos_embed\.embed$", "pos_embed.weight"),
        (
            r"^block_stack\.blocks\.(\d+)\.block([01])\.",
            lambda match: f"blocks.{2 * int(match[1]) + int(match[2])}.",
        ),
        (r"\.norm\.scale$", ".norm1.weight"),
        (r"\.norm2\.scale$", ".norm2.weight"),
        (r"\.upproj\.", ".mlp.fc1."),
        (r"\.downproj\.", ".mlp.fc2."),
        (r"\.interaction_module\.", ".mixer."),
        (r"\.orientation_", ".orientation."),
        (r"\.eigenvalues_", "."),
        (r"\.direct\.bias$", ".direct"),
        (r"\.mhnorm\.scale$", ".norm_weight"),
        (r"\.outprojection\.", ".proj."),
        (r"^norm\.scale$", "norm.weight"),
        (r"^head\.", "head.fc."),
    ],
    join=[Join(("query", "key", "value_"), "qkv")],
    reshape=True,
)


def _layout(dim: int, num_heads: int, depth: int = 12, **options: Any) -> Layout:
    layers = {
        "stem_layer": partial(patch_stem, norm_layer=None),
        "mixer": {"cycle": [{"name": "plstm", "mode": "P"}, {"name": "plstm", "mode": "D"}]},
        "mlp_layer": mlp,
        "norm_layer": partial(RmsNorm, eps=1e-5),
        "head_layer": partial(CornerHead, corners=4),
        "global_pool": "corners",
    }
    return Layout(Plain, layers | {"embed_dim": dim, "num_heads": num_heads, "depth": depth} | options, _KEYS)


# The authors published neither weights nor figures of ImageNet in their code.
VARIANTS = {
    "plstm_vis_tiny": Variant(_layout(192, 3)),
    "plstm_vis_small": Variant(_layout(384, 6)),
    "plstm_vis_base": Variant(_layout(768, 12)),
    "test_plstm_vis": Variant(_layout(32, 2, depth=3, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2506.11997",
    paper_name="pLSTM: parallelizable Linear Source Transition Mark networks",
    license="mit",
)
