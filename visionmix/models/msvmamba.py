"""MSVMamba: one selective scan of the map, three of a smaller one, and feed-forwards that see neighbours.

Source: MSVMamba (Shi et al. 2024, arXiv 2405.14174), first version. The mixer is `visionmix.mixers.MultiScaleScan`.
"""

from collections.abc import Sequence

from torch import Tensor

from visionmix.layers import ConvMlp
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vmamba import vmamba


def _transform(key: str, tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """Split the parameters of the scans, which the files stack, the low resolution first."""
    if ".mixer.scan." not in key:
        return tensor
    keys = [key.replace(".scan.", f".{branch}_scan.") for branch in ("low", "full")]
    return dict(zip(keys, tensor.chunk(2), strict=True))


_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.conv\.", ".mixer.full_conv."),
        (r"\.mixer\.conv2d_b1\.", ".mixer.low_conv."),
        (r"\.se\.fc\.0\.", ".se.fc1."),
        (r"\.se\.fc\.2\.", ".se.fc2."),
        (r"\.convFFN\.linear", ".mlp.fc"),
        (r"\.convFFN\.dwc\.", ".mlp.conv."),
    ],
    transform=_transform,
)


def _layout(dim: int, depths: Sequence[int]) -> Layout:
    return vmamba(dim, depths, "multi_scale_scan", patch_merging=True, mlp_layer=ConvMlp).with_keys(_KEYS)


def _in1k(folder: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page=f"https://drive.google.com/drive/folders/{folder}", top1=top1)}


VARIANTS = {
    "msvmamba_nano": Variant(_layout(48, (1, 2, 5, 2)), _in1k("1J41w3ApitQhp2O3wHmJoOs4U032uqebK", 77.3), 7, 0.9),
    "msvmamba_micro": Variant(_layout(64, (1, 2, 5, 2)), _in1k("1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", 79.8), 12, 1.5),
    "msvmamba_tiny": Variant(_layout(96, (1, 2, 9, 2)), _in1k("1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", 82.8), 33, 4.6),
    "test_msvmamba": Variant(_layout(16, (1, 1, 1, 1)).with_options(img_size=96)),
}

register_family(__name__, VARIANTS, paper="arXiv 2405.14174")
