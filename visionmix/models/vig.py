"""ViG: bidirectional gated linear attention, plain and hierarchical.

Source: ViG (Liao et al. 2024, arXiv 2405.18425). The models differ from their skeletons by a table only; the mixer
is `visionmix.mixers.GatedLinearAttention`.
"""

from functools import partial
from typing import Any

from timm.layers import RmsNorm
from torch import nn

from visionmix.backbones import Hierarchical, Plain
from visionmix.layers import swiglu
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.weights import KeyMap

_PLAIN = {"norm_layer": partial(RmsNorm, eps=1e-6)}
_HIERARCHICAL = {"mixer": "gated_linear_attention", "mlp_layer": partial(swiglu, multiple_of=32)}


def _mixer(**options: Any) -> dict[str, Any]:
    # eval_scale: the published plain models halve the merged directions twice in eval mode.
    return {"name": "gated_linear_attention", "eval_scale": 0.5, **options}


def _dims(first: int) -> tuple[int, ...]:
    return tuple(first << stage for stage in range(4))


def _weights(file: str) -> dict[str, str]:
    return {"hf_hub_id": "hustvl/ViG", "hf_hub_filename": file}


VARIANTS = {
    "vig_t": Variant(
        Plain,
        _PLAIN | {"embed_dim": 192, "num_heads": 3, "mixer": _mixer(conv_act=True, out_act=True)},
        _weights("vig_t.pth"),
        Published(params=6, top1=77.2),
    ),
    "vig_s": Variant(
        Plain,
        _PLAIN | {"embed_dim": 384, "num_heads": 6, "mixer": _mixer()},
        _weights("vig_s.pth"),
        # GMACs: a fifth of DeiT-B's 17.6, as the abstract has it; README.md says why the count here is higher.
        Published(params=23, gmacs=3.5, top1=81.7),
    ),
    "vig_b": Variant(
        Plain,
        _PLAIN | {"embed_dim": 768, "num_heads": 12, "mixer": _mixer()},
        _weights("vig_b.pth"),
        Published(params=89, top1=82.6),
    ),
    "vig_h_t": Variant(
        Hierarchical,
        _HIERARCHICAL | {"embed_dims": _dims(96), "depths": (2, 2, 5, 2), "num_heads": _dims(3)},
        _weights("vig_h_t.pth"),
        Published(params=29, top1=82.8),
    ),
    "vig_h_s": Variant(
        Hierarchical,
        _HIERARCHICAL | {"embed_dims": _dims(96), "depths": (2, 2, 17, 2), "num_heads": _dims(3)},
        _weights("vig_h_s.pth"),
        Published(params=50, top1=83.8),
    ),
    "vig_h_b": Variant(
        Hierarchical,
        _HIERARCHICAL | {"embed_dims": _dims(128), "depths": (2, 2, 17, 2), "num_heads": _dims(4)},
        _weights("vig_h_b.pth"),
        Published(params=89, top1=84.2),
    ),
    "test_vig": Variant(
        Plain,
        _PLAIN | {"img_size": 96, "embed_dim": 48, "depth": 3, "num_heads": 3, "mixer": _mixer()},
    ),
    "test_vig_h": Variant(
        Hierarchical,
        _HIERARCHICAL | {"img_size": 96, "embed_dims": _dims(24), "depths": (1, 1, 2, 1), "num_heads": _dims(3)},
    ),
}

_MIXER_NAMES = [
    (r"\.in_proj\.0\.", ".conv."),
    (r"\.qkv_proj\.", ".qkv."),
    (r"\.gk_proj\.0\.", ".gate_down."),
    (r"\.gk_proj\.1\.", ".gate_up."),
    (r"\.g_proj\.", ".out_gate."),
    (r"\.g_norm\.", ".global_norm."),
    (r"\.l_norm\.", ".local_norm."),
    (r"\.o_proj\.", ".proj."),
]
_PLAIN_NAMES = [
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
_HIERARCHICAL_NAMES = [
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    # The published code ends a stage with its downsampler; here the next stage begins with it.
    (r"^layers\.(\d+)\.downsample\.1\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.3\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.op\.", ".mixer."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`, plain or hierarchical."""
    if isinstance(model, Plain):
        return KeyMap(rename=_PLAIN_NAMES + _MIXER_NAMES)
    return KeyMap(rename=_HIERARCHICAL_NAMES + _MIXER_NAMES)


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2405.18425", license="mit")
