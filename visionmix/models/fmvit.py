"""FMViT: blocks of convolutions alternating with blocks that mix high and low frequencies, all re-parameterisable.

Source: FMViT (Tan et al. 2023, arXiv 2311.05707), whose repository, tany0699/FMViT, has neither code nor weights. The
mixers are `visionmix.mixers.MultiGroupMixer` and `MultiFrequencyMixer`. From the paper: a stem of convolutions and four
stages; convolutional fusion blocks and multi-frequency mixing blocks; convolutions trained as sums of several numbers
of groups, which become one for inference, as `reparameterize()` does here; attention whose projections are such
convolutions. Decided here: convolutional blocks alone in the first stage, from the second on both kinds in turn; no
norms but the batch norms of the convolutions; ReLU; feed-forwards of ratio 3; keys of squares of 4, 2 and 1 cells a
side; all widths and depths, so that parameters and GMACs are none of the paper's. Parameters are counted before the
sums become one convolution each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.layers import BatchNorm, ConvDownsample, Stem, StemConv
from visionmix.layers.multi_group import MultiGroupConv
from visionmix.models import Layout, Variant, register_family
from visionmix.models.hosts import doubled


class _Mlp(nn.Module):
    """``conv(relu(conv(x)))`` with two 1x1 convolutions that are trained as several.

    Shapes: (batch, height, width, dim) to the same.
    """

    needs_map = True

    def __init__(self, dim: int, *, mlp_ratio: float = 3.0, **dd: Any) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.fc1 = MultiGroupConv(dim, hidden, **dd)
        self.act = nn.ReLU()
        self.fc2 = MultiGroupConv(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _no_norm(dim: int, **dd: Any) -> nn.Identity:
    return nn.Identity()


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return four 3x3 convolutions with batch norms and ReLU, the first and last of stride 2."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
    first = StemConv(embed_dim, 3, 2, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)
    half = first._replace(channels=embed_dim // 2, stride=1)
    return Stem(in_chans, [half._replace(stride=2), half, half, first], **dd)


def _layout(dims: Sequence[int], depths: Sequence[int], **options: Any) -> Layout:
    mixed = [{"cycle": ["multi_group", {"name": "multi_frequency", "sr_ratio": ratio}]} for ratio in (4, 2, 1)]
    layers = {
        "embed_dims": dims,
        "depths": depths,
        "mixer": ["multi_group", *mixed],
        "stem_layer": _stem,
        "downsample_layer": partial(ConvDownsample, bias=False, norm_layer=BatchNorm),
        "mlp_layer": _Mlp,
        "norm_layer": _no_norm,
        "final_norm_layer": BatchNorm,
    }
    return Layout(Hierarchical, layers | options)


# The accuracies that the paper prints are of weights that were never published.
VARIANTS = {
    "fmvit_tiny": Variant(_layout(doubled(48), (2, 2, 6, 2))),
    "fmvit_small": Variant(_layout(doubled(64), (2, 2, 8, 2))),
    "fmvit_base": Variant(_layout(doubled(80), (3, 4, 12, 2))),
    "test_fmvit": Variant(_layout(doubled(16), (1, 2, 2, 1), img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2311.05707", paper_name="FMViT: A multiple-frequency mixing Vision Transformer"
)
