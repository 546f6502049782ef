"""SOFT and SOFT++: attention by a Gaussian kernel in three stages, softmax beside a class token in the fourth.

Source: SOFT (Lu et al. 2021, arXiv 2110.11945), and SOFT++ (Lu et al. 2022, arXiv 2207.03341), which the published code
calls soft_norm. The mixer is `visionmix.mixers.SoftmaxFreeAttention`. In SOFT++'s published code an image's result
depends on the others of its batch; here it does with ``published_step=True`` alone. The small models have 38.9 million
parameters in the published code too, where its README says 24. The published multiply-adds leave out Newton's
iteration, which takes about a tenth of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import LayerNorm
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical, Stage, TokenBlock
from visionmix.layers import (
    ConvsDownsample,
    Grid,
    PrefixTokens,
    Stem,
    StemConv,
    TokenHead,
    join_prefix,
    mlp,
    split_prefix,
)
from visionmix.mixers.softmax_free import SoftmaxFreeAttention
from visionmix.models import Join, KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.pvt import pvt
from visionmix.models.keys import shifted, split_class_position


def _class_position(key: str, tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the positions of the last stage apart, those of its cells and of the class token."""
    if key != "stages.3.pos_embed.weight":
        return tensor
    made = split_class_position("pos_embed.weight", tensor)
    return made if isinstance(made, Tensor) else {key: made.pop("pos_embed.weight"), **made}


_KEYS = KeyMap(
    rename=[
        (r"^patch_embed1\.proj\.([036])\.", lambda match: f"stem.conv{int(match[1]) // 3 + 1}."),
        (r"^patch_embed1\.proj\.([147])\.", lambda match: f"stem.norm{int(match[1]) // 3 + 1}."),
        (r"^patch_embed(\d)\.proj\.0\.", shifted("stages.{}.downsample.conv1.", -1)),
        (r"^patch_embed(\d)\.proj\.1\.", shifted("stages.{}.downsample.norm1.", -1)),
        (r"\.att\.mha\.attn\.Qlandmark_op\.", ".mixer.landmark_conv."),
        (r"\.att\.mha\.attn\.Qnorm_act\.0\.", ".mixer.landmark_norm."),
        (r"\.att\.mha\.attn\.conv\.", ".mixer.conv."),
        (r"\.att\.mha\.ff\.", ".mixer.proj."),
        (r"\.att\.mha\.", ".mixer."),
        (r"\.att\.ff(\d)\.", r".mlp.fc\1."),
        (r"\.att\.norm", ".norm"),
        (r"^cls_token$", "class_token.weight"),
    ],
    transform=_class_position,
    join=[Join(("W_q", "W_v"), "qv")],
)


class _PostNormBlock(Block):
    """``x = norm1(x + drop(mixer(x)))``, then ``x = norm2(x + drop(mlp(x)))``, on maps.

    The rate of stochastic depth is that of a dropout of single elements, as in the published code, so that training by
    its settings is the same.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself

    def __init__(self, dim: int, *, drop_path: float = 0.0, **options: Any) -> None:
        super().__init__(dim, **options)
        for scale in [self.scale1, self.scale2] if self.has_mlp else [self.scale1]:
            scale.add_module("drop_path", nn.Dropout(drop_path))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold nothing: no norm stands before a linear layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.scale1(x, self.mixer(x)))
        if self.has_mlp:
            x = self.norm2(self.scale2(x, self.mlp(x)))
        return x


class _TokenStage(Stage):
    """`Stage` on the cells and a class token, which is the last of `carry` before it and after it."""

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        if carry is None:
            raise ValueError("carry=None holds no class token; give a list that ends in one, (batch, 1, dim)")
        x = self.pos_embed(self.downsample(x))
        grid = Grid(x.shape[1], x.shape[2], [0], None)
        x = join_prefix(x.flatten(1, 2), carry[-1], grid.prefix_positions)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        cells, token = split_prefix(self.norm(x), grid.prefix_positions)
        carry.append(token)
        return cells.unflatten(1, (grid.height, grid.width))


class Soft(Hierarchical):
    """`Hierarchical` with a class token beside the last stage's map, which the classifier sees.

    `forward_features` returns the sequence (batch, 1 + rows * columns, embed_dims[-1]), the class token first.

    Args:
        *arguments: Those of `Hierarchical`, as `options`.
        embed_dims: Channels of each stage.
        published_step: Whether all mixers have the option `published_step` of `SoftmaxFreeAttention`.

    Raises:
        ValueError: `published_step` is asked for, and no mixer is SOFT++'s.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 1

    def __init__(
        self, *arguments: Any, embed_dims: Sequence[int], published_step: bool = False, **options: Any
    ) -> None:
        super().__init__(*arguments, embed_dims=embed_dims, **options)
        dd: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        self.class_token = PrefixTokens(embed_dims[-1], **dd)
        if published_step:
            mixers = [each for each in self.modules() if isinstance(each, SoftmaxFreeAttention) and each.normalised]
            if not mixers:
                raise ValueError("published_step=True is a step of SOFT++ alone, which no mixer is; leave it out")
            for mixer in mixers:
                mixer.published_step = True

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised class token and cells (batch, 1 + rows * columns, embed_dims[-1])."""
        x = self.stem(self.check(x))
        carry = [self.class_token.tokens(x.shape[0])]
        for stage in self.stages:
            x = stage(x, carry)
        return self.norm(join_prefix(x.flatten(1, 2), carry[-1], [0]))

    @torch.jit.ignore
    def _enter(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.stem(self.check(x)), [self.class_token.tokens(x.shape[0])]

    @torch.jit.ignore
    def _cells(self, state: tuple[Tensor, list[Tensor]], norm: bool) -> tuple[Tensor, Tensor]:
        x, carry = state
        prefix = carry[1] if len(carry) > 1 else x.flatten(1, 2)[:, :0]  # the first is what the last stage takes
        return (self.norm(x), self.norm(prefix)) if norm else (x, prefix)

    @torch.jit.ignore
    def _leave(self, state: tuple[Tensor, list[Tensor]]) -> Tensor:
        x, carry = state
        return self.norm(join_prefix(x.flatten(1, 2), carry[-1], [0]))


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return three 3x3 convolutions with batch norms and ReLU, the first and the last of stride 2."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
    first, last = _conv(32), _conv(embed_dim)
    return Stem(in_chans, [first, first._replace(stride=1), last], **dd)


def _downsample(dim: int, out_dim: int, **dd: Any) -> ConvsDownsample:
    return ConvsDownsample(dim, [_conv(out_dim)], **dd)


def _conv(dim: int) -> StemConv:
    return StemConv(dim, 3, 2, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)


def _layout(width: int, depths: Sequence[int], normalised: bool, dims: Sequence[int] = (), **options: Any) -> Layout:
    """Return the layout of a model whose third stage has `width` channels."""
    dims = dims or (64, 128, width, 512)
    mixers = [
        {"name": "softmax_free", "sr_ratio": ratio, "kernel_size": size, "normalised": normalised}
        for ratio, size in ((8, 9), (4, 5), (2, 3))
    ]
    host = pvt(dims, depths, [*mixers, "softmax"], [dim // 32 for dim in dims])
    gelu = partial(mlp, mlp_ratio=4.0, act_layer=partial(nn.GELU, approximate="tanh"))
    layers = {
        "stem_layer": _stem,
        "downsample_layer": _downsample,
        "stage_layer": [Stage, Stage, Stage, _TokenStage],
        "block_layer": [_PostNormBlock, _PostNormBlock, _PostNormBlock, TokenBlock],
        "mlp_layer": [gelu, gelu, gelu, partial(mlp, mlp_ratio=4.0)],
        "norm_layer": [partial(LayerNorm, eps=eps) for eps in (1e-5, 1e-5, 1e-5, 1e-6)],
        "final_norm_layer": "same",
        "head_layer": TokenHead,
        "global_pool": "token",
    }
    return Layout(Soft, {**host.options, **layers, **options}, _KEYS + host.keys)


def _in1k(top1: float, file: str, tag: str = "in1k", **facts: Any) -> dict[str, Weights]:
    return {tag: Weights(page=f"https://drive.google.com/file/d/{file}", top1=top1, crop_pct=0.9, **facts)}


_pp_in1k = partial(_in1k, paper="arXiv 2207.03341", paper_name="Softmax-free Linear Transformers")


_TINY, _SMALL, _MEDIUM = (320, (1, 2, 3, 2)), (320, (1, 3, 20, 4)), (288, (1, 3, 29, 5))
_LARGE, _HUGE = (320, (1, 3, 40, 5)), (352, (1, 5, 49, 5))
# The second was trained with the CUDA kernel of the same function.
_TINY_IN1K = _in1k(79.3, "1S04DCotIOkP0DaBb8WStQ513z82qT9de") | _in1k(
    79.3, "1inDKh3Wz_2KQgGH_2ywU5H_gLKZpIz_u", "in1k_cuda"
)

VARIANTS = {
    "soft_tiny": Variant(_layout(*_TINY, False), _TINY_IN1K, 13, 1.9),
    "soft_small": Variant(_layout(*_SMALL, False), {}, 24, 3.3),
    "soft_medium": Variant(_layout(*_MEDIUM, False), {}, 45, 7.2),
    "soft_large": Variant(_layout(*_LARGE, False), {}, 64, 11.0),
    "soft_huge": Variant(_layout(*_HUGE, False), {}, 87, 16.3),
    "softpp_tiny": Variant(_layout(*_TINY, True), _pp_in1k(79.4, "1Isy5b9v_4pyIXDqhKPNRq3WKH0etDlfl"), 13, 1.9),
    "softpp_small": Variant(_layout(*_SMALL, True), _pp_in1k(82.4, "1OBjn7FzVdNP1Urqxq7X0yDykyPhxAAW1"), 24, 3.3),
    "softpp_medium": Variant(_layout(*_MEDIUM, True), _pp_in1k(83.1, "1K2C6daaJn3jwurWh38uvV7rexirWjuzh"), 45, 7.2),
    "softpp_large": Variant(_layout(*_LARGE, True), _pp_in1k(83.3, "1aRYuF_gbBGyiXUDKEcpHJmM04SdvTUdP"), 64, 11.0),
    "softpp_huge": Variant(_layout(*_HUGE, True), {}, 87, 16.3),
    "test_soft": Variant(_layout(64, (1, 1, 2, 1), False, (32, 32, 64, 64), img_size=96)),
    "test_softpp": Variant(_layout(64, (1, 1, 2, 1), True, (32, 32, 64, 64), img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2110.11945",
    paper_name="SOFT: Softmax-free Transformer with Linear Complexity",
    license="mit",
)
