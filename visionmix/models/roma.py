"""RoMA: selective scans along rows and columns from both ends, after pre-training on remote sensing images.

Source: RoMA (Wang et al. 2025, arXiv 2503.10392), the models of its scene classification, which are those of ARM (Ren
et al. 2024, arXiv 2406.07537). The mixer is `visionmix.mixers.MultiMamba`, the class token stands in the middle. Where
the published code averages the means of the tokens before and after it, ``global_pool="avg"`` takes the mean of all,
which differs for an odd number of cells alone.

Files of the pre-training load too: every direction begins as the one that was trained, and the class token, the last
norm and the classifier are fresh.
"""

import math
from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor

from visionmix.layers import swiglu
from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vim import vim

_SCANS = 4


def _cells_alone(key: str, tensor: Tensor) -> Tensor:
    """Return the positions of a file without a class token, whose cells are a square, as a map."""
    side = math.isqrt(tensor.shape[1]) if tensor.ndim == 3 else 0
    square = key == "pos_embed.weight" and side * side == tensor.shape[1]
    return tensor.unflatten(1, (side, side)) if square else tensor


def _each_direction(tensors: dict[str, Tensor]) -> None:
    """Give the scans that a file lacks the parameters of the first."""
    for key in [key for key in tensors if ".scans.0." in key]:
        for scan in range(1, _SCANS):
            tensors.setdefault(key.replace(".scans.0.", f".scans.{scan}."), tensors[key])


_KEYS = KeyMap(
    rename=[
        (r"^backbone\.", ""),
        (r"\.mixer\.forward_scan\.", ".mixer.scans.0."),
        (r"\.mixer\.backward_scan\.", ".mixer.scans.1."),
        (r"\.mixer\.A_c_log$", ".mixer.scans.2.A_log"),
        (r"\.mixer\.A_c_b_log$", ".mixer.scans.3.A_log"),
        (r"\.mixer\.(D|conv1d|x_proj|dt_proj)_c\b", r".mixer.scans.2.\1"),
        (r"\.mixer\.(D|conv1d|x_proj|dt_proj)_c_b\b", r".mixer.scans.3.\1"),
        (r"(\.scans\.\d)\.conv1d\.", r"\1.conv."),
        (r"(\.scans\.\d)\.dt_proj\.", r"\1.delta_"),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ],
    drop={
        r"^(angle_embed|ar_\w+|dec_\w+|enc2dec|mask|norm_\d)\b": "the decoder of the published pre-training",
        r"^(decoder|rotated)\b": "the decoder of the pre-training here",
    },
    lacks={
        r"^class_token\.": "pre-training has no class token",
        r"^norm\.": "pre-training has norms of its own, one for each block that its decoder reads",
    },
    join=[Join(("w1", "w2"), "fc1"), _each_direction],
)
_FIRST = KeyMap(transform=_cells_alone)


def _layout(dim: int, depth: int = 12, **options: Any) -> Layout:
    layers = {
        "mixer": {"name": "multi_mamba", "expand": 1, "channel_gate": False},
        "mlp_layer": partial(swiglu, multiple_of=1, bias=True),
        "norm_layer": partial(LayerNorm, eps=1e-5),
    }
    host = vim(dim, depth, **layers, **options)
    return Layout(host.skeleton, host.options, _FIRST + host.keys + _KEYS)


# Published for the base model alone, without a classifier.
_BASE = Weights(hf_hub_id="initiacms/RoMA", file="mamba-base.pth", license="mit")

VARIANTS = {
    "roma_arm_tiny": Variant(_layout(384)),
    "roma_arm_small": Variant(_layout(512)),
    "roma_arm_base": Variant(_layout(768), {"roma": _BASE}, params=85),
    "test_roma_arm": Variant(_layout(32, depth=3, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2503.10392",
    paper_name="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
)
