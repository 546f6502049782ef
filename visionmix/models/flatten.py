"""FLatten Transformers: focused linear attention in PVT, PVTv2, Swin and CSWin.

Source: FLatten Transformer (Han et al. 2023, arXiv 2308.00442). The mixer is `visionmix.mixers.FocusedLinearAttention`;
the PVTs have it in every stage, the Swins and CSWins in the first two.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from visionmix.backbones import Hierarchical
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.hosts import cswin, pvt, swin
from visionmix.models.weights import KeyMap, reshape_to


def _variant(host: dict[str, Any], file: str = "", top1: float | None = None, **options: Any) -> Variant:
    weights = {"url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"} if file else {}
    return Variant(Hierarchical, host | options, weights, Published(top1=top1))


def _pvt(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> dict[str, Any]:
    return pvt.pvt(dims, depths, "focused")


def _pvt_v2(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> dict[str, Any]:
    return pvt.pvt_v2(dims, depths, "focused")


def _window_size(side: int) -> int:
    return 7 if side <= 56 else 12


def _swin(dim: int, depths: Sequence[int], heads: int) -> dict[str, Any]:
    return swin.swin(dim, depths, heads, "LLSS", lambda stage: "focused", _window_size)


def _cswin(dim: int, depths: Sequence[int], heads: int) -> dict[str, Any]:
    return cswin.cswin(dim, depths, heads, "LLSS", lambda stage: {"name": "focused", "lepe": True})


VARIANTS = {
    "flatten_pvt_tiny": _variant(_pvt((2, 2, 2, 2)), "3ab1d773f19d45648690", 77.8),
    "flatten_pvt_small": _variant(_pvt((3, 4, 6, 3))),
    "flatten_pvt_medium": _variant(_pvt((3, 4, 18, 3))),
    "flatten_pvt_large": _variant(_pvt((3, 8, 27, 3))),
    "flatten_pvt_v2_b0": _variant(_pvt_v2((2, 2, 2, 2), (32, 64, 160, 256)), "5d1f01532b104da28e7b", 71.1),
    "flatten_pvt_v2_b1": _variant(_pvt_v2((2, 2, 2, 2))),
    "flatten_pvt_v2_b2": _variant(_pvt_v2((3, 4, 6, 3))),
    "flatten_pvt_v2_b3": _variant(_pvt_v2((3, 4, 18, 3))),
    "flatten_pvt_v2_b4": _variant(_pvt_v2((3, 8, 27, 3))),
    "flatten_swin_tiny": _variant(_swin(96, (2, 2, 6, 2), 3), "e1518e76703e4e57a7f2", 82.1),
    "flatten_swin_small": _variant(_swin(96, (2, 2, 18, 2), 3), "94188e52af354bf4a88b", 83.5),
    "flatten_swin_base": _variant(_swin(128, (2, 2, 18, 2), 4), "7a9e5186bad04e7fb3a9", 83.8),
    "flatten_cswin_tiny": _variant(_cswin(64, (2, 4, 18, 1), 2), "48ba765ba8b0451d9d5a", 83.1),
    "flatten_cswin_small": _variant(_cswin(64, (2, 4, 32, 2), 2)),
    "flatten_cswin_base": _variant(_cswin(96, (3, 6, 29, 2), 4)),
    "test_flatten_pvt": _variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64)), img_size=96),
    "test_flatten_pvt_v2": _variant(_pvt_v2((1, 1, 2, 1), (8, 16, 40, 64)), img_size=96),
    "test_flatten_swin": _variant(_swin(16, (1, 1, 2, 1), 1), img_size=96),
    "test_flatten_cswin": _variant(_cswin(16, (1, 1, 2, 1), 2), img_size=96),
}

_NAMES = [(r"\.positional_encoding$", ".pos_embed.weight")]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    drop = dict(swin.DROP)
    if isinstance(model.norm, nn.Identity):
        drop[r"^norm\."] = "the published PVT has a last norm and never calls it"
    return KeyMap(
        rename=[*pvt.NAMES, *swin.NAMES, *cswin.NAMES, *_NAMES],
        drop=drop,
        join=pvt.JOIN,
        transform=reshape_to(model),
    )


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2308.00442", license="unknown")
