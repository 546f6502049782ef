"""CARE: linear attention and convolutions on separate channels, beside channels that are kept as a memory.

Source: CARE Transformer (Zhou et al. 2024, arXiv 2411.16170). The mixer is `visionmix.mixers.DecoupledMixer`. Two
classifiers, of which a teacher trains one, see the last map; their mean is the result.

The last published block ends before its last projection and its sum, at four times the width. Here its wide part
belongs to the head, so that the last feature map has the width of its stage.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, SelectAdaptivePool2d
from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.backbones.block import Residual
from visionmix.layers import ConvMlp, NormConvDownsample, patch_stem
from visionmix.layers.fold import entry_of, fold_before
from visionmix.layers.norm import BatchNorm
from visionmix.layers.truncated import draw_convolutions
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family

_mlp = partial(ConvMlp, residual=False, act_first=True)


class _LastBlock(nn.Module):
    """``y = mixer(x)``, then ``f = f + mlp(norm(f))`` for the channels f of y that the mixer mixed, three quarters.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        mixer: Makes the token mixer.
        mlp_layer: Makes a feed-forward from the width and `mlp_ratio`.
        norm_layer: Makes a norm over channels.
        ratios: Hidden width over the width, of this feed-forward and of one of all channels.
        **options: Those of other blocks, without effect.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[..., nn.Module],
        mlp_layer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
        ratios: tuple[float, float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        mixed = 3 * (dim // 4)
        self.parts = [dim - mixed, mixed]
        self.mixer = mixer()
        self.norm1 = norm_layer(mixed, device=device, dtype=dtype)
        self.mlp1 = mlp_layer(mixed, mlp_ratio=ratios[0], device=device, dtype=dtype)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the feed-forward, for inference."""
        self.norm1 = fold_before(self.norm1, entry_of(self.mlp1))

    def forward(self, x: Tensor) -> Tensor:
        return self.interacted(self.mixer(x))

    def interacted(self, y: Tensor) -> Tensor:
        """Return y with what the mixed channels learn of each other."""
        memory, mixed = y.split(self.parts, dim=-1)
        return torch.cat([memory, mixed + self.mlp1(self.norm1(mixed))], dim=-1)


class _Block(_LastBlock):
    """`_LastBlock`, then ``y = y + mlp(norm(y))`` for all channels and ``x + gamma * y``, with drop path of y."""

    def __init__(self, dim: int, *, drop_path: float = 0.0, layer_scale: float | None = None, **options: Any) -> None:
        super().__init__(dim, **options)
        dd = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.norm2 = options["norm_layer"](dim, **dd)
        self.mlp2 = options["mlp_layer"](dim, mlp_ratio=options["ratios"][1], **dd)
        self.scale = Residual(dim, drop_path, layer_scale, **dd)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norms into the feed-forwards, for inference."""
        self.norm1 = fold_before(self.norm1, entry_of(self.mlp1))
        self.norm2 = fold_before(self.norm2, entry_of(self.mlp2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.interacted(self.mixer(x))
        return self.scale(x, y + self.mlp2(self.norm2(y)))


class _Head(nn.Module):
    """Two classifiers of one map, with the interface of timm's `ClassifierHead`.

        z      = gelu(pool(depthwise3x3(gelu(W x))))
        logits = (fc(dropout(norm(z))) + dist_fc(dropout(dist_norm(z)))) / 2

    In distilled training, both terms of the sum apart. Before the classifiers stands ``(norm(z) + dist_norm(z)) / 2``.

    Shapes: (batch, height, width, in_features) to (batch, num_classes); without pooling to (batch, height, width,
    num_classes), and without classifiers the last axis is `hidden_size`.

    Args:
        in_features: Channels of the map.
        num_classes: Outputs; 0 for no classifiers.
        pool_type: timm's pooling types; "" for none.
        drop_rate: Dropout rate before the classifiers.
        mlp_ratio: Channels after W over `in_features`.

    Raises:
        ValueError: `pool_type` joins two poolings, which the norms do not fit.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        mlp_ratio: int = 4,
        **dd: Any,
    ) -> None:
        super().__init__()
        width = mlp_ratio * in_features
        self.proj = nn.Linear(in_features, width, **dd)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, **dd)
        self.drop_path = nn.Identity()
        self.norm, self.dist_norm = LayerNorm(width, eps=1e-6, **dd), LayerNorm(width, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.hidden_size = width
        self.distilled_training = False
        self._classify(num_classes, pool_type, **dd)

    @torch.jit.ignore
    def _classify(self, num_classes: int, pool_type: str, **dd: Any) -> None:
        if pool_type == "catavgmax":
            raise ValueError("global_pool='catavgmax' is too wide for the norms; give 'avg', 'max', 'avgmax' or ''")
        self.pool_type = pool_type
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")

        def classifier() -> nn.Module:
            return nn.Linear(self.hidden_size, num_classes, **dd) if num_classes else nn.Identity()

        self.fc, self.dist_fc = classifier(), classifier()

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifiers by fresh ones, and the pooling where one is given."""
        self._classify(num_classes, self.pool_type if pool_type is None else pool_type)

    @torch.jit.ignore
    def drop_projection(self) -> None:
        """Remove the layers before the classifiers, for a model that returns features alone."""
        self.proj = self.conv = self.act = self.norm = self.dist_norm = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(self.proj(x)).permute(0, 3, 1, 2)
        x = self.act(self.global_pool(self.drop_path(self.conv(x).permute(0, 2, 3, 1))))
        own, taught = self.drop(self.norm(x)), self.drop(self.dist_norm(x))
        if not pre_logits:
            own, taught = self.fc(own), self.dist_fc(taught)
            if not torch.jit.is_scripting():
                if self.distilled_training and self.training:
                    return own, taught
        return (own + taught) / 2


class CareTransformer(Hierarchical):
    """`Hierarchical` with two classifiers, as timm has distilled models.

    Args:
        *arguments: Those of `Hierarchical`, as `options`.
        drop_path_rate: Rate of stochastic depth at the last block, which has no sum: in training, whole images lose
            what the classifiers see at this rate, as in the published code.
    """

    def __init__(self, *arguments: Any, drop_path_rate: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, drop_path_rate=drop_path_rate, **options)
        self.head.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw the weights of linear layers and convolutions from a truncated normal of deviation 0.02, biases 0."""
        super().init_weights()
        draw_convolutions(self)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Return the last linear layers: that of the labels, and that of the teacher."""
        return self.head.fc, self.head.dist_fc

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return in training the logits of both classifiers, the first for the labels, the second for a teacher's."""
        self.head.distilled_training = enable


def _keys(last: int) -> KeyMap:
    """Return the map of keys of a model whose last stage ends with the block of number `last`."""
    wide = rf"^stages\.3\.blocks\.{last}\.inter_layer\.inter2_"
    return KeyMap(
        rename=[
            (r"^stem\.0\.", "stem.conv1."),
            (r"^stem\.1\.", "stem.norm1."),
            (r"\.downsample\.0\.", ".downsample.norm.bn."),
            (r"\.downsample\.1\.", ".downsample.conv."),
            (r"\.gamma$", ".scale.gamma"),
            (r"\.token_mixer\.", ".mixer."),
            (r"\.dwconvatt_1\.", ".column_conv."),
            (r"\.dwconvatt_2\.", ".row_conv."),
            (r"\.dwconv1\.", ".near_conv."),
            (r"\.dwconv2\.", ".far_conv."),
            (wide + r"norm\.", "norm.bn."),
            (wide + r"fc1\.", "head.proj."),
            (wide + r"conv\.", "head.conv."),
            (r"\.inter_layer\.inter(\d)_norm\.", r".norm\1.bn."),
            (r"\.inter_layer\.inter(\d)_", r".mlp\1."),
            (r"^dist_head\.", "head.dist_"),
        ],
        reshape=True,
    )


def _layout(
    dims: Sequence[int], depths: Sequence[int], num_heads: int, ratios: Sequence[tuple[int, int]], **options: Any
) -> Layout:
    *blocks, last = (partial(_Block, ratios=pair) for pair in ratios)
    strips = {"name": "decoupled", "strips": 11}
    layers = {
        "mixer": [strips, strips, "decoupled", "decoupled"],
        "num_heads": (num_heads,) * 4,
        "stem_layer": partial(patch_stem, norm_layer=nn.BatchNorm2d),
        "downsample_layer": partial(NormConvDownsample, norm_layer=BatchNorm),
        "block_layer": [*blocks, [last] * (depths[-1] - 1) + [partial(_LastBlock, ratios=ratios[-1])]],
        "mlp_layer": _mlp,
        "norm_layer": BatchNorm,
        "head_layer": partial(_Head, mlp_ratio=ratios[-1][1]),
        "layer_scale": 1e-6,
    }
    sizes = {"embed_dims": tuple(dims), "depths": tuple(depths)}
    classifiers = ("head.fc", "head.dist_fc")
    return Layout(CareTransformer, layers | sizes | options, _keys(depths[-1] - 1), classifier=classifiers)


def _in1k(top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(page="https://drive.google.com/drive/folders/1UGRHQKjBGY8EjUtsHLsy9VBXp7rfUqkf", top1=top1)}


_S0, _S1, _S2 = (
    ((2, 2), (2, 4), (4, 4), (4, 4)),
    ((2, 4), (2, 4), (4, 4), (4, 4)),
    ((4, 4), (4, 4), (4, 4), (4, 4)),
)

VARIANTS = {
    "care_s0": Variant(_layout((32, 64, 128, 256), (2, 4, 8, 4), 2, _S0), _in1k(78.4), params=7.3, gmacs=0.7),
    "care_s1": Variant(_layout((32, 64, 128, 256), (3, 6, 10, 6), 2, _S1), _in1k(80.1), params=9.6, gmacs=1.0),
    "care_s2": Variant(_layout((32, 64, 192, 384), (3, 6, 10, 6), 3, _S2), _in1k(82.1), params=19.5, gmacs=1.9),
    "test_care": Variant(_layout((8, 16, 32, 64), (1, 1, 1, 2), 2, ((1, 2),) * 4, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2411.16170",
    paper_name="CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
)
