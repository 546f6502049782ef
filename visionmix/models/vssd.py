"""VSSD: state-space duality without an order in three stages, softmax attention in the last.

Source: VSSD (Shi et al. 2024, arXiv 2407.18559), whose stem, downsamplers and blocks are those of MLLA (Han et al.
2024, arXiv 2405.16605). The mixer is `visionmix.mixers.NonCausalSSD`. The published classifier takes sides that are
multiples of 32; here any size runs, as in the published code for detection. GMACs here include every product of the
mixers; the published ones lie up to 4 % lower, though the published tiny model counts to 4.66 by the same counter.
"""

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical
from visionmix.layers import ConvPosition, ConvsDownsample, Stem, StemConv, mlp
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, doubled
from visionmix.models.keys import NEXT_STAGE

_STEM = {"1": "1", "2.0": "2", "2.1": "3", "3.0": "4", "3.1": "5"}
_KEYS = KeyMap(
    rename=[
        (r"^patch_embed\.conv(1|2\.0|2\.1|3\.0|3\.1)\.(conv|norm)\.", lambda m: f"stem.{m[2]}{_STEM[m[1]]}."),
        NEXT_STAGE,
        (r"\.downsample\.conv\.(\d)\.(conv|norm)\.", lambda m: f".downsample.{m[2]}{int(m[1]) + 1}."),
        (r"^layers\.", "stages."),
        (r"\.cpe1\.", ".pos.conv."),
        (r"\.cpe2\.", ".pos2.conv."),
        (r"\.attn\.to_qkv\.", ".attn.qkv."),
        (r"\.attn\.(to_out|out_proj)\.", ".attn.proj."),
        (r"\.attn\.conv2d\.", ".attn.conv."),
        (r"\.attn\.dt_bias$", ".attn.delta_bias"),
        (r"\.attn\.", ".mixer."),
        HEAD,
    ]
)


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


class _Block(Block):
    """`Block` with a second position encoding, before the feed-forward."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, pos_layer=ConvPosition, **options)
        self.pos2 = ConvPosition(dim, device=options["device"], dtype=options["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        x = x + self.pos2(x)
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


def _layout(dim: int, depths: Sequence[int], heads: int, d_state: int, **options: Any) -> Layout:
    mixer = {"name": "non_causal_ssd", "d_state": d_state}
    layers = {
        "stem_layer": _Stem,
        "downsample_layer": _downsample,
        "block_layer": _Block,
        "mixer": [mixer, mixer, mixer, {"name": "softmax", "qkv_bias": False}],
        "mlp_layer": mlp,
    }
    sizes = {"embed_dims": doubled(dim), "depths": tuple(depths), "num_heads": doubled(heads)}
    return Layout(Hierarchical, layers | sizes | options, _KEYS)


def _in1k(size: str, top1: float, end: str = "best_ema", mesa: float | None = None) -> dict[str, Weights]:
    def weights(file: str, top1: float) -> Weights:
        return Weights(hf_hub_id="YuhengSSS/VSSD", file=f"vssd_{size}_{file}.pth", top1=top1)

    return {"in1k": weights(end, top1)} | ({"mesa_in1k": weights("e300_with_mesa", mesa)} if mesa else {})


VARIANTS = {
    "vssd_micro": Variant(_layout(48, (2, 2, 8, 4), 2, 48), _in1k("micro", 82.5, "best"), 14, 2.3),
    "vssd_tiny": Variant(_layout(64, (2, 4, 8, 4), 2, 64), _in1k("tiny", 83.6, mesa=84.1), 24, 4.5),
    "vssd_small": Variant(_layout(64, (3, 4, 21, 5), 2, 64), _in1k("small", 84.1, mesa=84.5), 40, 7.4),
    "vssd_base": Variant(_layout(96, (3, 4, 21, 5), 3, 64), _in1k("base", 84.7, mesa=85.4), 89, 16.1),
    "test_vssd": Variant(_layout(16, (1, 1, 1, 1), 1, 8, img_size=96)),
}

register_family(__name__, VARIANTS, paper="arXiv 2407.18559")
