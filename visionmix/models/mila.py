"""MILA: linear attention between the projections, convolution and gate of a Mamba block.

Source: MILA (Han et al. 2024, arXiv 2405.16605), which its repository calls MLLA. The mixer is
`visionmix.mixers.MambaInspiredLinearAttention`. The published classifier takes square images
alone, whose sides are multiples of 32; here any size runs.
"""

from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import leaplab_in1k
from visionmix.models.hosts.mila import mila
from visionmix.models.keys import Join

_KEYS = KeyMap(
    rename=[
        (r"\.(in_proj|act_proj)\.", r".mixer.\1."),
        (r"\.dwc\.", ".mixer.conv."),
        (r"\.out_proj\.", ".mixer.proj."),
    ],
    drop={r"\.rope\.rotations$": "cosines and sines of the rotary encodings, known from the map's size"},
    join=[Join(("in_proj", "act_proj"), "in_proj")],
)


def _mila(dim: int, depths: tuple[int, ...], heads: int) -> Layout:
    return mila(dim, depths, heads, "mila").with_keys(_KEYS)


VARIANTS = {
    "mila_tiny": Variant(
        _mila(64, (2, 4, 8, 4), 2), leaplab_in1k("7a19712877cb4242889c", 83.5, crop_mode="center"), 25, 4.2
    ),
    "mila_small": Variant(
        _mila(64, (3, 6, 21, 6), 2), leaplab_in1k("0e5d0b1409d540aaa80c", 84.4, crop_mode="center"), 43, 7.3
    ),
    "mila_base": Variant(
        _mila(96, (3, 6, 21, 6), 3), leaplab_in1k("91c85c5a1061496d8796", 85.3, crop_mode="center"), 96, 16.2
    ),
    "test_mila": Variant(_mila(16, (1, 1, 1, 1), 1).with_options(img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2405.16605", paper_name="Demystify Mamba in Vision: A Linear Attention Perspective"
)
