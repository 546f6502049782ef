"""ConvNeXt-dcls: depthwise convolutions of a large reach, whose few weights lie at learned positions, in ConvNeXt.

Source: dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2021, arXiv 2112.03740) in the layout of
ConvNeXt (Liu et al. 2022, arXiv 2201.03545). The mixer is `visionmix.mixers.LearnableSpacings`; the blocks of a stage
share its positions, which are parameters of the stage here and repeated for every block in published files. The
published training moved positions with five times the learning rate and kept them apart by a loss.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import ClassifierHead, LayerNorm
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Hierarchical, Residual, Stage
from visionmix.backbones.block import Maker, placed
from visionmix.layers import NormConvDownsample, Stem, StemConv, mlp
from visionmix.layers.truncated import DrawnConvolutions, draw_convolutions
from visionmix.mixers.learnable_spacings import LearnableSpacings
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import HEAD, doubled

_NORM = partial(LayerNorm, eps=1e-6)

_KEYS = KeyMap(
    rename=[
        (r"^downsample_layers\.0\.0\.", "stem.conv1."),
        (r"^downsample_layers\.0\.1\.", "stem.norm1."),
        (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
        (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
        (r"\.downsample\.conv\.conv\.", ".downsample.conv."),  # this library's former name
        (r"^stages\.(\d)\.\d+\.dwconv\.P$", r"stages.\1.spacings.positions"),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".mixer."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
        (r"(?<!scale)\.gamma$", ".scale.gamma"),
        (r"^norm\.", "head.norm."),
        HEAD,
    ],
    tied={r"\.spacings\.positions$": "the blocks of a stage share their positions"},
)


class _Block(nn.Module):
    """``x + gamma * mlp(norm(mixer(x)))``, with the mixer's kernel from outside where it is given.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        mixer: Makes the token mixer.
        mlp_layer: Makes the feed-forward from `dim`.
        norm_layer: Makes a norm over channels from `dim`.
        **options: `drop_path` and `layer_scale` of `visionmix.backbones.Residual`.
    """

    spaced: Final[bool]

    def __init__(self, dim: int, *, mixer: Maker, mlp_layer: Maker, norm_layer: Maker, **options: Any) -> None:
        super().__init__()
        dd = placed(options)
        self.mixer = mixer()
        self.norm = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, **dd)
        self.scale = Residual(dim, **options)
        self.spaced = isinstance(self.mixer, LearnableSpacings)

    def forward(self, x: Tensor, kernel: Tensor | None = None) -> Tensor:
        if self.spaced:
            y = self.mixer(x) if kernel is None else self.mixer.convolve(x, kernel)
        else:
            y = self.mixer(x)
        return self.scale(x, self.mlp(self.norm(y)))


class _Stem(DrawnConvolutions, Stem):
    """A convolution of whole patches and a norm."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__(in_chans, [StemConv(embed_dim, patch_size, patch_size, 0, norm_layer=_NORM)], **dd)


class _Stage(Stage):
    """`Stage` that owns the positions of its mixers' kernels, if all are `LearnableSpacings`."""

    shares: Final[bool]

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], **options: Any) -> None:
        super().__init__(downsample, blocks, **options)
        mixers = [block.mixer for block in blocks]
        self.shares = all(isinstance(mixer, LearnableSpacings) for mixer in mixers)
        self.spacings = mixers[0].spacings if self.shares else nn.Identity()
        if self.shares:
            kinds = {(each.weight.shape[-1], 2 * each.spacings.reach + 1, each.spacings.version) for each in mixers}
            if len(kinds) > 1:
                raise ValueError(
                    f"mixer has kernels of several (kernel_count, kernel_size, version) in one stage, {sorted(kinds)}; "
                    "its blocks share their positions, so give one mixer a stage"
                )
            for mixer in mixers:
                mixer.spacings = nn.Identity()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        draw_convolutions(self.downsample)

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        for block in self.blocks:
            kernel = torch.jit.annotate(Tensor | None, None)
            if self.shares:
                kernel = self.spacings(block.mixer.weight)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, kernel)
            else:
                x = block(x, kernel)
        return self.norm(x)


class _Head(ClassifierHead):
    """timm's `ClassifierHead` on maps, with a norm between the pooling and the classifier."""

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, **dd: Any
    ) -> None:
        super().__init__(in_features, num_classes, pool_type, drop_rate, input_fmt="NHWC", **dd)
        self.norm = _NORM(in_features, **dd)

    @torch.jit.ignore
    def drop_projection(self) -> None:
        """Remove the norm, for a model that returns features alone."""
        self.norm = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.fc(x)


def _layout(embed_dim: int, depths: Sequence[int], kernel_count: int, **options: Any) -> Layout:
    layers = {
        "mixer": {"name": "dcls", "kernel_count": kernel_count},
        "stem_layer": _Stem,
        "downsample_layer": partial(NormConvDownsample, norm_layer=_NORM),
        "stage_layer": _Stage,
        "block_layer": _Block,
        "mlp_layer": mlp,
        "norm_layer": _NORM,
        "final_norm_layer": None,
        "head_layer": _Head,
        "layer_scale": 1e-6,
    }
    return Layout(Hierarchical, layers | {"embed_dims": doubled(embed_dim), "depths": tuple(depths)} | options, _KEYS)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"https://zenodo.org/record/7112021/files/convnext_dcls_{size}_1k_224_ema.pth", top1=top1)}


VARIANTS = {
    "convnext_dcls_tiny": Variant(_layout(96, (3, 3, 9, 3), 34), _in1k("tiny", 82.5), 28, 5.0),
    "convnext_dcls_small": Variant(_layout(96, (3, 3, 27, 3), 40), _in1k("small", 83.7), 50, 9.5),
    "convnext_dcls_base": Variant(_layout(128, (3, 3, 27, 3), 40), _in1k("base", 84.1), 89, 16.5),
    "test_convnext_dcls": Variant(_layout(16, (1, 1, 2, 1), 6, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2112.03740",
    paper_name="Dilated convolution with learnable spacings",
    license="mit",
)
