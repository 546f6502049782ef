"""FLatten Transformers: focused linear attention in PVT, PVTv2 and CSWin.

Source: FLatten Transformer (Han et al. 2023, arXiv 2308.00442). The mixer is `visionmix.mixers.FocusedLinearAttention`;
the PVTs have it in every stage, the CSWins in the first two.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from visionmix.backbones import Hierarchical
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.hosts.cswin import JOIN as CSWIN_JOIN
from visionmix.models.hosts.cswin import NAMES as CSWIN_NAMES
from visionmix.models.hosts.cswin import STRIPES, cswin
from visionmix.models.hosts.pvt import JOIN as PVT_JOIN
from visionmix.models.hosts.pvt import NAMES as PVT_NAMES
from visionmix.models.hosts.pvt import pvt, pvt_v2
from visionmix.models.weights import KeyMap, reshape_to

_WIDE, _NARROW = (64, 128, 320, 512), (32, 64, 160, 256)
_CSWIN_MIXERS = [{"name": "focused", "lepe": True}] * 2 + STRIPES[2:]


def _variant(options: dict[str, Any], file: str = "", top1: float | None = None, **more: Any) -> Variant:
    weights = {"url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"} if file else {}
    return Variant(Hierarchical, options | more, weights, Published(top1=top1))


def _pvt(depths: Sequence[int], host: Any = pvt, dims: Sequence[int] = _WIDE) -> dict[str, Any]:
    return host(dims, depths, (1, 2, 5, 8), (8, 8, 4, 4), "focused")


def _cswin(dim: int, depths: Sequence[int], heads: int) -> dict[str, Any]:
    return cswin(dim, depths, [heads << stage for stage in range(4)], _CSWIN_MIXERS)


VARIANTS = {
    "flatten_pvt_tiny": _variant(_pvt((2, 2, 2, 2)), "3ab1d773f19d45648690", 77.8),
    "flatten_pvt_small": _variant(_pvt((3, 4, 6, 3))),
    "flatten_pvt_medium": _variant(_pvt((3, 4, 18, 3))),
    "flatten_pvt_large": _variant(_pvt((3, 8, 27, 3))),
    "flatten_pvt_v2_b0": _variant(_pvt((2, 2, 2, 2), pvt_v2, _NARROW), "5d1f01532b104da28e7b", 71.1),
    "flatten_pvt_v2_b1": _variant(_pvt((2, 2, 2, 2), pvt_v2)),
    "flatten_pvt_v2_b2": _variant(_pvt((3, 4, 6, 3), pvt_v2)),
    "flatten_pvt_v2_b3": _variant(_pvt((3, 4, 18, 3), pvt_v2)),
    "flatten_pvt_v2_b4": _variant(_pvt((3, 8, 27, 3), pvt_v2)),
    "flatten_cswin_tiny": _variant(_cswin(64, (2, 4, 18, 1), 2), "48ba765ba8b0451d9d5a", 83.1),
    "flatten_cswin_small": _variant(_cswin(64, (2, 4, 32, 2), 2)),
    "flatten_cswin_base": _variant(_cswin(96, (3, 6, 29, 2), 4)),
    "test_flatten_pvt": _variant(_pvt((1, 1, 2, 1), dims=(8, 16, 40, 64)), img_size=96),
    "test_flatten_pvt_v2": _variant(_pvt((1, 1, 2, 1), pvt_v2, (8, 16, 40, 64)), img_size=96),
    "test_flatten_cswin": _variant(_cswin(16, (1, 1, 2, 1), 2), img_size=96),
}

_NAMES = [(r"\.positional_encoding$", ".pos_embed.weight")]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    unused = {} if isinstance(model.norm, nn.LayerNorm) else {r"^norm\.": "a norm that the published PVT never calls"}
    return KeyMap(
        rename=PVT_NAMES + CSWIN_NAMES + _NAMES,
        drop=unused,
        transform=reshape_to(model),
        join=PVT_JOIN | CSWIN_JOIN,
    )


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2308.00442", license="unknown")
