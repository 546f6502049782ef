"""InLine: injective linear attention with predicted convolutions in DeiT, PVT, Swin and CSWin.

Source: InLine (Han et al. 2024, arXiv 2412.06590). The mixer is `visionmix.mixers.InjectiveLinearAttention`; DeiTs and
PVTs have it in every block, the others in their first stages. The authors print 50.2 million parameters for the largest
PVT and 25, 43 and 96 for the CSWins, where their code and configurations make 51.2 and 21, 33 and 73.
"""

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from visionmix.backbones import Block
from visionmix.mixers import InjectiveLinearAttention
from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import cswin, deit, leaplab_in1k, pvt, swin

_KEYS = KeyMap(rename=[(r"\.mixer\.residual\.", ".mixer.kernels.")])


class _UnnormedBlock(Block):
    """`Block` whose mixer predicts its kernels from the block's input as it comes, without the norm."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        if not isinstance(self.mixer, InjectiveLinearAttention):
            raise ValueError(
                f"a mixer of class {type(self.mixer).__qualname__} predicts no kernels from the block's input; give "
                "block_layer=visionmix.backbones.Block with other mixers than 'inline'"
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale1(x, self.mixer.forward_from(self.norm1(x), x))
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


def _deit(dim: int, heads: int, size: int = 224, depth: int = 12) -> Layout:
    return deit.deit(dim, heads, ["inline"] * depth).with_keys(_KEYS).with_options(img_size=size)


def _pvt(
    depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512), heads: Sequence[int] = (2, 4, 10, 16)
) -> Layout:
    return pvt.pvt(dims, depths, "inline", heads).with_keys(_KEYS)


def _swin(dim: int, depths: Sequence[int], heads: int, letters: str) -> Layout:
    return swin.swin(dim, depths, heads, letters, lambda stage: "inline", swin.seven_or_eighth).with_keys(_KEYS)


def _cswin(dim: int, depths: Sequence[int], heads: int) -> Layout:
    mixer = {"name": "inline", "lepe": True}
    layout = cswin.cswin(dim, depths, heads, "IISS", lambda stage: mixer).with_keys(_KEYS)
    return layout.with_options(block_layer=[_UnnormedBlock, _UnnormedBlock, Block, Block])


_DEIT_288 = leaplab_in1k("2f3898b07e9247f3beb3", 80.2, crop_pct=0.875)
_DEIT_448 = leaplab_in1k("10bdd726d4b0435eb34e", 82.3, crop_pct=0.875)

VARIANTS = {
    "inline_deit_tiny": Variant(_deit(192, 6), leaplab_in1k("1d6b8191ad6d4114b291", 74.5), 6.5, 1.1),
    "inline_deit_small": Variant(_deit(320, 10, 288), _DEIT_288, 16.7, 5.0),
    "inline_deit_base": Variant(_deit(384, 12, 448), _DEIT_448, 23.8, 17.2),
    "inline_pvt_tiny": Variant(_pvt((2, 2, 2, 2)), leaplab_in1k("90ac52b1555b401eb5e6", 78.2), 12.0, 2.0),
    "inline_pvt_small": Variant(_pvt((3, 4, 6, 3)), leaplab_in1k("1ab953b2479d433080a3", 82.0), 21.6, 3.9),
    "inline_pvt_medium": Variant(_pvt((3, 4, 18, 3)), leaplab_in1k("a72aec31e6084bc0a280", 83.2), 37.6, 6.9),
    "inline_pvt_large": Variant(_pvt((3, 8, 27, 3)), leaplab_in1k("efd91318ba964f01b288", 83.6), 50.2, 10.2),
    "inline_swin_tiny": Variant(
        _swin(96, (2, 2, 6, 2), 3, "IIIS"), leaplab_in1k("32810869fcc34410966b", 82.4), 30, 4.5
    ),
    "inline_swin_small": Variant(
        _swin(96, (2, 2, 18, 2), 3, "IISS"), leaplab_in1k("e9657fd247c04c7cb1a1", 83.6), 50, 8.7
    ),
    "inline_swin_base": Variant(
        _swin(128, (2, 2, 18, 2), 4, "IIMS2"), leaplab_in1k("bf23564bb64c420aafe1", 84.1), 88, 15.4
    ),
    "inline_cswin_tiny": Variant(_cswin(64, (2, 4, 18, 1), 2), leaplab_in1k("49fa2ecc543647c4b970", 83.2), 25, 4.3),
    "inline_cswin_small": Variant(_cswin(64, (3, 6, 29, 2), 2), leaplab_in1k("59f4e65f776f4052b93c", 83.8), 43, 6.8),
    "inline_cswin_base": Variant(_cswin(96, (3, 6, 29, 2), 4), leaplab_in1k("91e17121df284ae38521", 84.5), 96, 14.9),
    "test_inline_deit": Variant(_deit(32, 4, 96, depth=3)),
    "test_inline_pvt": Variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64), (2, 2, 4, 4)).with_options(img_size=96)),
    "test_inline_swin": Variant(_swin(16, (3, 1, 1, 1), 1, "MIIS1").with_options(img_size=96)),
    "test_inline_cswin": Variant(_cswin(16, (1, 1, 2, 1), 2).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2412.06590",
    paper_name="Bridging the Divide: Reconsidering Softmax and Linear Attention",
)
