"""ViG: bidirectional gated linear attention, plain and hierarchical.

Source: ViG (Liao et al. 2024, arXiv 2405.18425). The models differ from their skeletons by a table only; the mixer
is `visionmix.mixers.GatedLinearAttention`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionmix.backbones import Hierarchical, Plain
from visionmix.layers import RmsNorm, swiglu
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import doubled
from visionmix.models.keys import NEXT_STAGE

_MIXER_KEYS = KeyMap(
    rename=[
        (r"\.in_proj\.0\.", ".conv."),
        (r"\.qkv_proj\.", ".qkv."),
        (r"\.gk_proj\.0\.", ".gate_down."),
        (r"\.gk_proj\.1\.", ".gate_up."),
        (r"\.g_proj\.", ".out_gate."),
        (r"\.g_norm\.", ".global_norm."),
        (r"\.l_norm\.", ".local_norm."),
        (r"\.o_proj\.", ".proj."),
    ]
)
_PLAIN_KEYS = KeyMap(
    rename=[
        (r"^pos_embed$", "pos_embed.weight"),
        (r"^patch_embed\.proj\.0\.", "stem.conv1."),
        (r"^patch_embed\.proj\.1\.", "stem.norm1."),
        (r"^patch_embed\.proj\.3\.", "stem.conv2."),
        (r"^patch_embed\.proj\.4\.", "stem.norm2."),
        (r"\.attn\.", ".mixer."),
        (r"\.attn_norm\.", ".norm1."),
        (r"\.mlp_norm\.", ".norm2."),
        (r"\.gate_proj\.", ".fc1."),
        (r"\.down_proj\.", ".fc2."),
        (r"^head\.", "head.fc."),
    ]
)
_HIERARCHICAL_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.0\.", "stem.conv1."),
        (r"^patch_embed\.2\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        NEXT_STAGE,
        (r"\.downsample\.1\.", ".downsample.conv."),
        (r"\.downsample\.3\.", ".downsample.norm."),
        (r"^layers\.", "stages."),
        (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
        (r"\.op\.", ".mixer."),
        (r"^classifier\.norm\.", "norm."),
        (r"^classifier\.head\.", "head.fc."),
    ]
)


def _plain(dim: int, heads: int, mixer: dict[str, Any] | None = None, **options: Any) -> Layout:
    # eval_scale: the published plain models halve the merged directions twice in eval mode.
    mixer = {"name": "gated_linear_attention", "eval_scale": 0.5, **(mixer or {})}
    layers = {"norm_layer": partial(RmsNorm, eps=1e-6), "mixer": mixer}
    return Layout(Plain, layers | {"embed_dim": dim, "num_heads": heads} | options, _PLAIN_KEYS + _MIXER_KEYS)


def _hierarchical(dim: int, depths: Sequence[int], heads: int) -> Layout:
    layers = {"mixer": "gated_linear_attention", "mlp_layer": partial(swiglu, multiple_of=32)}
    sizes = {"embed_dims": doubled(dim), "depths": depths, "num_heads": doubled(heads)}
    return Layout(Hierarchical, layers | sizes, _HIERARCHICAL_KEYS + _MIXER_KEYS)


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id="hustvl/ViG", file=f"{file}.pth", top1=top1)}


VARIANTS = {
    "vig_t": Variant(_plain(192, 3, {"conv_act": True, "out_act": True}), _in1k("vig_t", 77.2), 6),
    # GMACs: a fifth of DeiT-B's 17.6, as the abstract has it; docs/performance.md says why the count here is higher.
    "vig_s": Variant(_plain(384, 6), _in1k("vig_s", 81.7), 23, 3.5),
    "vig_b": Variant(_plain(768, 12), _in1k("vig_b", 82.6), 89),
    "vig_h_t": Variant(_hierarchical(96, (2, 2, 5, 2), 3), _in1k("vig_h_t", 82.8), 29),
    "vig_h_s": Variant(_hierarchical(96, (2, 2, 17, 2), 3), _in1k("vig_h_s", 83.8), 50),
    "vig_h_b": Variant(_hierarchical(128, (2, 2, 17, 2), 4), _in1k("vig_h_b", 84.2), 89),
    "test_vig": Variant(_plain(48, 3, img_size=96, depth=3)),
    "test_vig_h": Variant(_hierarchical(24, (1, 1, 2, 1), 3).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2405.18425",
    paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    license="mit",
)
