"""MILA as a host: a stem of five convolutions, downsamplers of three, blocks with two position encodings.

Source: MILA (Han et al. 2024, arXiv 2405.16605), which its repository calls MLLA.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.backbones.block import TwoPositionsBlock
from visionmix.backbones.contract import MixerSpec
from visionmix.layers import ConvsDownsample, Stem, StemConv, mlp
from visionmix.models.hosts import HEAD, doubled
from visionmix.models.keys import NEXT_STAGE, KeyMap
from visionmix.models.layout import Layout

_STEM = {"1": "1", "2.0": "2", "2.1": "3", "3.0": "4", "3.1": "5"}
_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.conv(1|2\.0|2\.1|3\.0|3\.1)\.(conv|norm)\.", lambda m: f"stem.{m[2]}{_STEM[m[1]]}."),
        NEXT_STAGE,
        (r"\.downsample\.conv\.(\d)\.(conv|norm)\.", lambda m: f".downsample.{m[2]}{int(m[1]) + 1}."),
        (r"^layers\.", "stages."),
        (r"\.cpe1\.", ".pos.conv."),
        (r"\.cpe2\.", ".pos2.conv."),
        (r"\.attn\.", ".mixer."),
        HEAD,
    ]
)


def mila(embed_dim: int, depths: Sequence[int], num_heads: int, mixer: MixerSpec | list[MixerSpec]) -> Layout:
    """Return the layout of MILA.

    Args:
        embed_dim: Channels of the first stage, an even number; every later one doubles them.
        depths: Blocks of each stage.
        num_heads: Heads of the first stage; every later one doubles them.
        mixer: The mixers, as the skeleton takes them.
    """
    options = {
        "embed_dims": doubled(embed_dim, len(depths)),
        "depths": tuple(depths),
        "num_heads": doubled(num_heads, len(depths)),
        "mixer": mixer,
        "stem_layer": _Stem,
        "downsample_layer": _downsample,
        "block_layer": TwoPositionsBlock,
        "mlp_layer": mlp,
    }
    return Layout(Hierarchical, options, _KEYS)


class _Stem(Stem):
    """Five convolutions with batch norms; the second and third are the branch of a residual."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        if patch_size != 4 or embed_dim % 2:
            raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
        conv = StemConv(embed_dim // 2, 3, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)
        convs = [
            conv._replace(stride=2),
            conv,
            conv._replace(act_layer=None),
            conv._replace(channels=4 * embed_dim, stride=2),
            conv._replace(channels=embed_dim, kernel_size=1, act_layer=None),
        ]
        super().__init__(in_chans, convs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        x = x + self.norm3(self.conv3(self.act2(self.norm2(self.conv2(x)))))
        x = self.act4(self.norm4(self.conv4(x)))
        return self.last(self.norm5(self.conv5(x)))


def _downsample(dim: int, out_dim: int, **dd: Any) -> ConvsDownsample:
    """Return a 1x1, a depthwise 3x3 convolution of stride 2 and a 1x1 convolution, ReLU between, a norm at the end."""
    first = StemConv(4 * out_dim, 1, act_layer=nn.ReLU)
    depthwise = first._replace(kernel_size=3, stride=2, groups=4 * out_dim)
    return ConvsDownsample(dim, [first, depthwise, StemConv(out_dim, 1, norm_layer=nn.BatchNorm2d)], **dd)
