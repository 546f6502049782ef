"""L2ViT: softmax attention in windows, then linear attention over the whole map and convolutions, in turn.

Source: The Linear Attention Resurrection in Vision Transformer (Zheng 2025, arXiv 2501.16182). The mixers are
`visionmix.mixers.WindowAttention` without biases and `visionmix.mixers.LinearGlobalAttention`. A model built for images
whose last maps are smaller than a window has smaller windows there, as Swin does; the published code pads such maps.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical, Residual, TwoPositionBlock
from visionmix.layers import ConvPosition, NormConvDownsample, Stem, StemConv, mlp, pad
from visionmix.layers.truncated import DrawnConvolutions
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, DrawnStage, doubled

_NORM = partial(LayerNorm, eps=1e-5)
_KEYS = KeyMap(
    rename=[
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.conv1."),
        (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.norm1."),
        (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.conv2."),
        (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.norm2."),
        (r"^downsample_layers\.0\.norm\.", "stem.norm."),
        (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
        (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
        (r"\.cpe\.0\.proj\.", ".pos.conv."),
        (r"\.cpe\.1\.proj\.", ".pos2.conv."),
        (r"\.attn\.", ".mixer."),
        (r"\.temperature$", ".head_scale"),
        (r"\.local_mp\.", ".local."),
        HEAD,
    ],
    reshape=True,
)


class _Stem(DrawnConvolutions, Stem):
    """Two 3x3 convolutions of stride 2 with batch norms, ReLU between, and a layer norm.

    The image gets zeros at the bottom and on the right until 4 divides both sides.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        if patch_size != 4 or embed_dim % 2:
            raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
        first = StemConv(embed_dim // 2, 3, 2, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)
        super().__init__(in_chans, [first, first._replace(channels=embed_dim, act_layer=None)], **dd)
        self.norm = _NORM(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        x = pad(x, [0, (width + 3) // 4 * 4 - width, 0, (height + 3) // 4 * 4 - height])
        x = self.act1(self.norm1(self.conv1(x)))
        return self.norm(self.last(self.norm2(self.conv2(x))))


class _Local(nn.Module):
    """``conv2(bn(gelu(conv1(x))))``, of depthwise 7x7 convolutions: the published local concentration module.

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, dim, dim, kernel_size=7, padding=3, groups=dim, **dd)
        self.conv1, self.act, self.bn, self.conv2 = conv(), nn.GELU(), nn.BatchNorm2d(dim, **dd), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.act(self.conv1(x.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)


class _GlobalBlock(Block):
    """`Block` after a convolution of position, with ``x = x + scale3(local(norm3(x)))`` before the feed-forward."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, pos_layer=ConvPosition, **options)
        dd = {"device": options["device"], "dtype": options["dtype"]}
        self.norm3 = options["norm_layer"](dim, **dd)
        self.local = _Local(dim, **dd)
        self.scale3 = Residual(dim, options["drop_path"], options["layer_scale"], **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        x = self.scale3(x, self.local(self.norm3(x)))
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


def _mixers(window_size: int) -> dict[str, Any]:
    windows = {"name": "window", "window_size": window_size, "relative_bias": False}
    return {"cycle": [windows, "linear_global"]}


def _layout(embed_dim: int, depths: Sequence[int], num_heads: int, **options: Any) -> Layout:
    layers = {
        "mixer": _mixers(window_size=7),
        "stem_layer": _Stem,
        "downsample_layer": partial(NormConvDownsample, norm_layer=_NORM, whole=True),
        "stage_layer": DrawnStage,
        "block_layer": {"cycle": [TwoPositionBlock, _GlobalBlock]},
        "mlp_layer": mlp,
        "norm_layer": _NORM,
    }
    sizes = {"embed_dims": doubled(embed_dim), "depths": tuple(depths), "num_heads": doubled(num_heads)}
    return Layout(Hierarchical, layers | sizes | options, _KEYS)


def _weights(name: str, top1: float | None = None, **facts: Any) -> Weights:
    release = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
    return Weights(f"{release}/L2ViT-{name}.pth", top1=top1, **facts)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": _weights(f"{size}-checkpoint-best-ema", top1)}


# At 384 pixels the authors' datasets.py resizes test images to a square and cuts nothing off.
_SQUASHED = {"input_size": 384, "crop_pct": 1.0, "crop_mode": "squash"}
_BASE_22K = {
    "in22k": _weights("Base-22k-pretrain-checkpoint-best", num_classes=21841),
    "in22k_in1k": _weights("Base-22k21k-finetune-224-checkpoint-best", 86.0),
    "in22k_in1k_384": _weights(
        "Base-22k21k-finetune-384-checkpoint-best", 87.0, gmacs=47.5, options={"mixer": _mixers(12)}, **_SQUASHED
    ),
}

VARIANTS = {
    "l2vit_tiny": Variant(_layout(96, (2, 2, 6, 2), 3), _in1k("Tiny", 83.1), 29, 4.7),
    "l2vit_small": Variant(_layout(96, (2, 2, 18, 2), 3), _in1k("Small", 84.1), 50, 9.0),
    "l2vit_base": Variant(_layout(128, (2, 2, 18, 2), 4), _in1k("Base", 84.4) | _BASE_22K, 89, 15.9),
    "test_l2vit": Variant(_layout(16, (2, 1, 2, 1), 1, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2501.16182",
    paper_name="The Linear Attention Resurrection in Vision Transformer",
    license="mit",
)
