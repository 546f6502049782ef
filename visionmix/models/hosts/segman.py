"""SegMAN's encoder as a host: two position encodings a block, feed-forwards with a convolution, biased scales.

Source: SegMAN (Fu et al. 2024, arXiv 2412.11890); A2Mamba (Lou et al. 2025, arXiv 2507.16624) has the same layout.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.backbones.block import TwoPositionBlock
from visionmix.layers import BatchNorm, ConvDownsample, ConvMlp, ProjectionHead, Stem, StemConv
from visionmix.models.hosts.vmamba import SCAN_KEYS
from visionmix.models.keys import KeyMap
from visionmix.models.layout import Layout

_STEM = {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2", 6: "conv3", 7: "norm3", 9: "conv4", 10: "norm4"}
_KEYS = (
    KeyMap(
        rename=[
            (r"^patch_embed\.(\d+)\.", lambda match: f"stem.{_STEM[int(match[1])]}."),
            (
                r"^layers\.([135])\.([01])\.",
                lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.{('conv', 'norm.bn')[int(m[2])]}.",
            ),
            (r"^layers\.([0246])\.", lambda match: f"stages.{int(match[1]) // 2}."),
            (r"^classifier\.0\.", "head.proj."),
            (r"^classifier\.1\.", "head.norm.bn."),
            (r"^classifier\.4\.", "head.fc."),
            (r"\.cpe1\.", ".pos.conv."),
            (r"\.cpe2\.", ".pos2.conv."),
            (r"\.token_mixer\.", ".mixer."),
            (r"\.mixer\.ssm\.", ".mixer."),
            (r"\.mlp\.dwconv\.", ".mlp.conv."),
            (r"\.layer_scale([12])\.", r".scale\1."),
            (r"\.rpb\.0$", ".position_bias"),
        ],
        drop={r"\.rope\.angle$": "the angles of the rotary encoding, which are computed"},
    )
    + SCAN_KEYS
)


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return four 3x3 convolutions with batch norms, GELU between; the first and third have stride 2."""
    if patch_size != 4 or embed_dim % 2:
        raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
    half = StemConv(embed_dim // 2, 3, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
    third = half._replace(channels=embed_dim, stride=2)
    return Stem(in_chans, [half._replace(stride=2), half, third, third._replace(stride=1, act_layer=None)], **dd)


class AffineResidual(nn.Module):
    """The end of a branch y of x with a factor and a summand per channel.

    ``x + drop_path(weight * y + bias)``, or with `of_input` ``weight * x + bias + drop_path(y)``.

    Shapes: x and y (..., dim) to the same.

    Args:
        dim: Channels.
        drop_path: Rate of stochastic depth.
        initial: Initial value of the factors.
        of_input: Whether x is scaled, and not y.
    """

    of_input: Final[bool]

    def __init__(self, dim: int, drop_path: float, initial: float, of_input: bool, **dd: Any) -> None:
        super().__init__()
        self.initial = initial
        self.of_input = of_input
        self.weight = nn.Parameter(torch.full((dim,), initial, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the factors to their initial value, the summands to 0."""
        nn.init.constant_(self.weight, self.initial)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.of_input:
            return torch.addcmul(self.bias, x, self.weight) + self.drop_path(y)
        return x + self.drop_path(torch.addcmul(self.bias, y, self.weight))


class ScaledBlock(TwoPositionBlock):
    """`TwoPositionBlock` with an `AffineResidual` behind mixer and feed-forward.

    Args:
        dim: Channels.
        initial: Initial value of the factors.
        of_input: Whether they scale the input, and not the branches.
        **options: Those of `visionmix.backbones.Block`.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(
        self, dim: int, *, initial: float, of_input: bool = False, drop_path: float = 0.0, **options: Any
    ) -> None:
        super().__init__(dim, drop_path=drop_path, **options)
        scale = partial(
            AffineResidual, dim, drop_path, initial, of_input, device=options["device"], dtype=options["dtype"]
        )
        self.scale1 = scale()
        if self.has_mlp:
            self.scale2 = scale()


def segman(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mixer: str,
    kernel_sizes: Sequence[int],
    mlp_ratios: Sequence[float],
    block_layer: Any = TwoPositionBlock,
) -> Layout:
    """Return the layout of SegMAN's encoder.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage, as `mixer` counts them.
        mixer: Name of the mixer, whose last stage has its `global_attention`.
        kernel_sizes: Rows and columns of each stage's windows.
        mlp_ratios: Hidden width of each stage's feed-forwards over its channels.
        block_layer: Makes the blocks, as the skeleton takes it.
    """
    last = len(depths) - 1
    options = {
        "embed_dims": tuple(embed_dims),
        "depths": tuple(depths),
        "num_heads": tuple(num_heads),
        "mixer": [
            {"name": mixer, "kernel_size": size, "global_attention": stage == last}
            for stage, size in enumerate(kernel_sizes)
        ],
        "stem_layer": _stem,
        "downsample_layer": partial(ConvDownsample, bias=False, norm_layer=BatchNorm),
        "block_layer": block_layer,
        "mlp_layer": [partial(ConvMlp, mlp_ratio=ratio, act_first=True) for ratio in mlp_ratios],
        "norm_layer": partial(LayerNorm, eps=1e-6),
        "final_norm_layer": None,
        "head_layer": ProjectionHead,
    }
    return Layout(Hierarchical, options, _KEYS)
