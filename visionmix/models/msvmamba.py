"""MSVMamba: one selective scan of the map, three of a smaller one, and feed-forwards that see neighbours.

Source: MSVMamba (Shi et al. 2024, arXiv 2405.14174), first version. The mixer is `visionmix.mixers.MultiScaleScan`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.layers import ConvMlp, PatchMerging, patch_stem
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.vmamba import RENAME as VMAMBA_NAMES
from visionmix.models.weights import KeyMap, reshape_to

_NONE = Published()
_LAYERS = {
    "stem_layer": patch_stem,
    "downsample_layer": PatchMerging,
    "mlp_layer": ConvMlp,
    "mixer": "multi_scale_scan",
}


def _variant(dim: int, depth: int, folder: str = "", published: Published = _NONE, **options: Any) -> Variant:
    sizes = {"embed_dims": tuple(dim << stage for stage in range(4)), "depths": (1, 2, depth, 2)}
    page = f"https://drive.google.com/drive/folders/{folder}" if folder else ""
    return Variant(Hierarchical, _LAYERS | sizes | options, {}, published, page)


VARIANTS = {
    "msvmamba_nano": _variant(48, 5, "1J41w3ApitQhp2O3wHmJoOs4U032uqebK", Published(7, 0.9, 77.3)),
    "msvmamba_micro": _variant(64, 5, "1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", Published(12, 1.5, 79.8)),
    "msvmamba_tiny": _variant(96, 9, "1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", Published(33, 4.6, 82.8)),
    "test_msvmamba": _variant(16, 1, img_size=96, depths=(1, 1, 1, 1)),
}

_NAMES = [
    (r"\.mixer\.conv\.", ".mixer.full_conv."),
    (r"\.mixer\.conv2d_b1\.", ".mixer.low_conv."),
    (r"\.se\.fc\.0\.", ".se.fc1."),
    (r"\.se\.fc\.2\.", ".se.fc2."),
    (r"\.convFFN\.linear", ".mlp.fc"),
    (r"\.convFFN\.dwc\.", ".mlp.conv."),
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    reshape = reshape_to(model)

    def transform(key: str, tensor: Tensor) -> Tensor | Mapping[str, Tensor]:
        if ".mixer.scan." not in key:
            return reshape(key, tensor)
        # The files stack the parameters of the scans, the low resolution first.
        keys = [key.replace(".scan.", f".{branch}_scan.") for branch in ("low", "full")]
        return {each: reshape(each, part) for each, part in zip(keys, tensor.chunk(2), strict=True)}

    return KeyMap(rename=VMAMBA_NAMES + _NAMES, transform=transform)


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2405.14174", license="unknown")
