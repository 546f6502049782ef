"""FLatten: focused linear attention in PVT, PVTv2, Swin and CSWin.

Source: FLatten Transformer (Han et al. 2023, arXiv 2308.00442). The mixer is `visionmix.mixers.FocusedLinearAttention`;
the PVTs have it in every stage, the Swins and CSWins in the first two.
"""

from collections.abc import Sequence

from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import cswin, leaplab_in1k, pvt, swin

_KEYS = KeyMap(rename=[(r"\.positional_encoding$", ".pos_embed.weight")], reshape=True)
_UNUSED_NORM = KeyMap(drop={r"^norm\.": "the published PVT has a last norm and never calls it"})
_WIDTHS = (64, 128, 320, 512)


def _pvt(depths: Sequence[int], dims: Sequence[int] = _WIDTHS) -> Layout:
    return pvt.pvt(dims, depths, "focused").with_keys(_KEYS + _UNUSED_NORM)


def _pvt_v2(depths: Sequence[int], dims: Sequence[int] = _WIDTHS) -> Layout:
    return pvt.pvt_v2(dims, depths, "focused").with_keys(_KEYS + _UNUSED_NORM)


def _swin(dim: int, depths: Sequence[int], heads: int) -> Layout:
    return swin.swin(dim, depths, heads, "LLSS", lambda stage: "focused").with_keys(_KEYS)


def _cswin(dim: int, depths: Sequence[int], heads: int) -> Layout:
    mixer = {"name": "focused", "lepe": True}
    return cswin.cswin(dim, depths, heads, "LLSS", lambda stage: mixer).with_keys(_KEYS)


VARIANTS = {
    "flatten_pvt_tiny": Variant(_pvt((2, 2, 2, 2)), leaplab_in1k("3ab1d773f19d45648690", 77.8)),
    "flatten_pvt_small": Variant(_pvt((3, 4, 6, 3))),
    "flatten_pvt_medium": Variant(_pvt((3, 4, 18, 3))),
    "flatten_pvt_large": Variant(_pvt((3, 8, 27, 3))),
    "flatten_pvt_v2_b0": Variant(_pvt_v2((2, 2, 2, 2), (32, 64, 160, 256)), leaplab_in1k("5d1f01532b104da28e7b", 71.1)),
    "flatten_pvt_v2_b1": Variant(_pvt_v2((2, 2, 2, 2))),
    "flatten_pvt_v2_b2": Variant(_pvt_v2((3, 4, 6, 3))),
    "flatten_pvt_v2_b3": Variant(_pvt_v2((3, 4, 18, 3))),
    "flatten_pvt_v2_b4": Variant(_pvt_v2((3, 8, 27, 3))),
    "flatten_swin_tiny": Variant(_swin(96, (2, 2, 6, 2), 3), leaplab_in1k("e1518e76703e4e57a7f2", 82.1)),
    "flatten_swin_small": Variant(_swin(96, (2, 2, 18, 2), 3), leaplab_in1k("94188e52af354bf4a88b", 83.5)),
    "flatten_swin_base": Variant(
        _swin(128, (2, 2, 18, 2), 4),
        leaplab_in1k("7a9e5186bad04e7fb3a9", 83.8) | leaplab_in1k("0d0330cf2e5249f1abb6", 85.0, input_size=384),
    ),
    "flatten_cswin_tiny": Variant(_cswin(64, (2, 4, 18, 1), 2), leaplab_in1k("48ba765ba8b0451d9d5a", 83.1)),
    "flatten_cswin_small": Variant(_cswin(64, (2, 4, 32, 2), 2)),
    "flatten_cswin_base": Variant(_cswin(96, (3, 6, 29, 2), 4)),
    "test_flatten_pvt": Variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64)).with_options(img_size=96)),
    "test_flatten_pvt_v2": Variant(_pvt_v2((1, 1, 2, 1), (8, 16, 40, 64)).with_options(img_size=96)),
    "test_flatten_swin": Variant(_swin(16, (1, 1, 2, 1), 1).with_options(img_size=96)),
    "test_flatten_cswin": Variant(_cswin(16, (1, 1, 2, 1), 2).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2308.00442",
    paper_name="FLatten Transformer: Vision Transformer using Focused Linear Attention",
)
