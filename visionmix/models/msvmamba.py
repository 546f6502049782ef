"""MSVMamba: one selective scan of the map, three of a smaller one, and feed-forwards that see neighbours.

Source: MSVMamba (Shi et al. 2024, arXiv 2405.14174), first version; `msvmambav3_*` are its authors' later release, on
the second version of VMamba. The mixer is `visionmix.mixers.MultiScaleScan`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from visionmix.backbones import Block
from visionmix.layers import ConvMlp
from visionmix.layers.fold import entry_of, fold_before
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vmamba import vmamba


class PostNormMlpBlock(Block):
    """`Block` with the norm of the feed-forward behind it: ``x = x + scale2(norm2(mlp(x)))``.

    Shapes, arguments: those of `visionmix.backbones.Block`.

    Source: the code of MSVMambav3.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the mixer's norm into the linear layer that reads it, for inference."""
        self.norm1 = fold_before(self.norm1, entry_of(self.mixer))

    def forward(self, x: Tensor) -> Tensor:
        if self.has_pos:
            x = x + self.pos(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        if self.has_mlp:
            x = self.scale2(x, self.norm2(self.mlp(x)))
        return x


def _split(key: str, tensor: Tensor, branches: Sequence[str]) -> Tensor | dict[str, Tensor]:
    """Split the parameters of the scans, which the files stack, in the order of `branches`."""
    if ".mixer.scan." not in key:
        return tensor
    keys = [key.replace(".scan.", f".{branch}_scan.") for branch in branches]
    return dict(zip(keys, tensor.chunk(2), strict=True))


def _keys(*branches: str) -> KeyMap:
    return KeyMap(
        rename=[
            (r"\.mixer\.conv\.", ".mixer.full_conv."),
            (r"\.mixer\.conv2d_b1\.", ".mixer.low_conv."),
            (r"\.se\.fc\.0\.", ".se.fc1."),
            (r"\.se\.fc\.2\.", ".se.fc2."),
            (r"\.convFFN\.linear", ".mlp.fc"),
            (r"\.convFFN\.dwc\.", ".mlp.conv."),
        ],
        transform=partial(_split, branches=branches),
    )


def _first(dim: int, depths: Sequence[int]) -> Layout:
    layout = vmamba(dim, depths, "multi_scale_scan", patch_merging=True, mlp_layer=ConvMlp)
    return layout.with_keys(_keys("low", "full"))


def _v3(dim: int, depths: Sequence[int], gate: bool = False) -> Layout:
    mixer = {"name": "multi_scale_scan", "expand": 1.0, "gate": gate, "merged_norm": True, "enlarge": "nearest"}
    layers = {"mlp_layer": partial(ConvMlp, mlp_ratio=4.0), "block_layer": PostNormMlpBlock}
    return vmamba(dim, depths, mixer, **layers).with_keys(_keys("full", "low"))


def _in1k(folder: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page=f"https://drive.google.com/drive/folders/{folder}", top1=top1)}


def _v3_in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id="YuhengSSS/MSVMamba", file=f"msvmambav3_{size}_224.pth", top1=top1)}


VARIANTS = {
    "msvmamba_nano": Variant(_first(48, (1, 2, 5, 2)), _in1k("1J41w3ApitQhp2O3wHmJoOs4U032uqebK", 77.3), 7, 0.9),
    "msvmamba_micro": Variant(_first(64, (1, 2, 5, 2)), _in1k("1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", 79.8), 12, 1.5),
    "msvmamba_tiny": Variant(_first(96, (1, 2, 9, 2)), _in1k("1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", 82.8), 33, 4.6),
    "msvmambav3_tiny": Variant(_v3(96, (2, 2, 9, 2)), _v3_in1k("tiny", 83.0), 32, 5.0),
    "msvmambav3_small": Variant(_v3(96, (2, 3, 20, 2)), _v3_in1k("small", 84.1), 50, 8.8),
    "msvmambav3_base": Variant(_v3(128, (2, 4, 18, 2), gate=True), _v3_in1k("base", 84.4), 91, 16.3),
    "test_msvmamba": Variant(_first(16, (1, 1, 1, 1)).with_options(img_size=96)),
    "test_msvmambav3": Variant(_v3(16, (1, 1, 1, 1)).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2405.14174",
    paper_name="Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
)
