"""DualToken-ViT: convolutions for what is near, and global tokens, carried through all stages, for what is far.

Source: DualToken-ViT (Chu et al. 2023, arXiv 2309.12424), which has neither public code nor weights. The mixer is
`visionmix.mixers.DualTokenAttention`. From the paper: LightViT's three stages, stem and patch merging (Huang et al.
2022, arXiv 2207.05557); blocks with a ConvNeXt block as their encoder, the position-aware token module, their sum, a
feed-forward and LightViT's bi-dimensional attention behind it; 7x7 global tokens. From LightViT's code: the layers of
stem, merging and bi-dimensional attention, widths, heads and ratios, a projection to 1,280 channels before the
classifier. Decided here: the depths, and the widths of the smallest model, with which it and the largest come to the
0.5 and 1.0 GMACs that the paper's abstract prints; an equal weight for the map's summary and the global tokens; norms.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Hierarchical, Residual, Stage
from visionmix.backbones.block import Maker, placed
from visionmix.layers import PatchMerging, ProjectionHead, Stem, StemConv, mlp
from visionmix.layers.downsample import patch_cells
from visionmix.mixers.dual_token import DualTokenAttention
from visionmix.models import Layout, Variant, register_family

_NORM = partial(LayerNorm, eps=1e-6)
_SIDE = 7  # rows and columns of the global tokens


class _BiDimensionalMlp(nn.Module):
    """A feed-forward, then a gate of channels from their means, and one of cells from their channels and these means.

        y   = mlp(x),  m = norm(y),  c = gelu(W_1 mean of m),  l = gelu(W_2 m)
        out = y * sigmoid(W_3 c) * sigmoid(W_4 [l, c])

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, **dd: Any) -> None:
        super().__init__()
        reduced = dim // 4
        self.mlp = mlp(dim, mlp_ratio=mlp_ratio, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.global_reduce = nn.Linear(dim, reduced, **dd)
        self.local_reduce = nn.Linear(dim, reduced, **dd)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(reduced, dim, **dd)
        self.cell_select = nn.Linear(2 * reduced, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        y = self.norm(x)
        channels = self.act(self.global_reduce(y.mean(dim=(1, 2), keepdim=True)))
        cells = self.act(self.local_reduce(y))
        both = torch.cat([cells, channels.expand(-1, x.shape[1], x.shape[2], -1)], dim=-1)
        return x * self.channel_select(channels).sigmoid() * self.cell_select(both).sigmoid()


class _Block(nn.Module):
    """``x = x + mlp1(norm0(conv(x)))``, ``x = x + mixer(norm1(x))``, ``x = x + mlp(norm2(x))``, with global tokens.

    Shapes: a map (batch, height, width, dim) and tokens (batch, 49, dim) to the same.
    """

    carries: Final[bool]

    def __init__(self, dim: int, *, mixer: Maker, mlp_layer: Maker, norm_layer: Maker, **options: Any) -> None:
        super().__init__()
        dd = placed(options)
        self.conv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, **dd)
        self.norm0, self.norm1, self.norm2 = (norm_layer(dim, **dd) for _ in range(3))
        self.encoder = mlp(dim, **dd)
        self.mixer = mixer()
        self.mlp = mlp_layer(dim, **dd)
        self.scale0, self.scale1, self.scale2 = (Residual(dim, **options) for _ in range(3))
        self.carries = isinstance(self.mixer, DualTokenAttention)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.scale0(x, self.encoder(self.norm0(y)))
        y = self.norm1(x)
        if self.carries:
            y, tokens = self.mixer.with_tokens(y, tokens)
        else:
            y = self.mixer(y)
        x = self.scale1(x, y)
        return self.scale2(x, self.mlp(self.norm2(x))), tokens


class _Merging(nn.Module):
    """`PatchMerging`, to whose result the largest cell of every patch is added, projected by itself.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim).
    """

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.stride = 2
        self.merge = PatchMerging(dim, out_dim, **dd)
        self.shortcut = nn.Linear(dim, out_dim, bias=False, **dd)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that a map of `height` by `width` becomes."""
        return self.merge.grid_size(height, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = patch_cells(x)
        largest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        return self.merge(x) + self.shortcut(largest)


class _Stage(Stage):
    """`Stage` whose blocks carry global tokens on; the first one owns them, later ones project them to their width."""

    first: Final[bool]
    undecayed = ("global_tokens",)

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], **layers: nn.Module | None) -> None:
        super().__init__(downsample, blocks, **layers)
        like = blocks[0].norm1.weight
        dd = {"device": like.device, "dtype": like.dtype}
        self.first = downsample is None
        if downsample is None:
            self.global_tokens = nn.Parameter(torch.empty(1, _SIDE * _SIDE, len(like), **dd))
            self.init_layer_weights()
        else:
            dim = downsample.shortcut.in_features
            self.project = nn.Sequential(LayerNorm(dim, eps=1e-5, **dd), nn.Linear(dim, len(like), bias=False, **dd))

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the tokens from a truncated normal of deviation 0.02."""
        if self.first:
            trunc_normal_(self.global_tokens, std=0.02)

    def forward(self, x: Tensor, carry: list[Tensor]) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        if self.first:
            tokens = self.global_tokens.repeat(x.shape[0], 1, 1)
        else:
            tokens = self.project(carry.pop())
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, tokens = checkpoint(block, x, tokens)
            else:
                x, tokens = block(x, tokens)
        carry.append(tokens)
        return self.norm(x)


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return a 3x3 convolution, three depthwise ones and another, three of them of stride 2."""
    if patch_size != 8:
        raise ValueError(f"patch_size={patch_size} does not suit three convolutions of stride 2; give 8")
    half = embed_dim // 2
    first = StemConv(half, 3, 2, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
    same, down = first._replace(stride=1, groups=half), first._replace(groups=half)
    return Stem(in_chans, [first, same, same, down, StemConv(embed_dim, 3, 2, norm_layer=LayerNorm)], **dd)


class _Head(ProjectionHead):
    """`ProjectionHead` with a LayerNorm and GELU."""

    def __init__(self, in_features: int, num_classes: int, *args: Any, hidden_size: int = 1280, **options: Any) -> None:
        super().__init__(in_features, num_classes, *args, hidden_size=hidden_size, **options)
        dd = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.norm, self.act = LayerNorm(hidden_size, eps=1e-5, **dd), nn.GELU()


def _layout(dims: Sequence[int], depths: Sequence[int], **options: Any) -> Layout:
    layers = {
        "patch_size": 8,
        "embed_dims": dims,
        "depths": depths,
        "num_heads": (2, 4, 8),
        "mixer": [{"name": "dual_token", "steps": steps, "side": _SIDE} for steps in (2, 1, 0)],
        "stem_layer": _stem,
        "downsample_layer": _Merging,
        "stage_layer": _Stage,
        "block_layer": _Block,
        "mlp_layer": [partial(_BiDimensionalMlp, mlp_ratio=ratio) for ratio in (8.0, 4.0, 4.0)],
        "norm_layer": _NORM,
        "head_layer": _Head,
    }
    return Layout(Hierarchical, layers | options)


# The accuracies that the paper prints, 75.4 and 79.4 % for 0.5 and 1.0 GMACs, are of weights that were never published.
VARIANTS = {
    "dualtoken_vit_mini": Variant(_layout((48, 96, 192), (2, 4, 4)), gmacs=0.5),
    "dualtoken_vit_tiny": Variant(_layout((64, 128, 256), (2, 4, 2))),
    "dualtoken_vit_small": Variant(_layout((64, 128, 256), (2, 6, 4)), gmacs=1.0),
    "test_dualtoken_vit": Variant(
        _layout((16, 32, 48), (1, 2, 1), img_size=96, head_layer=partial(_Head, hidden_size=64))
    ),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2309.12424",
    paper_name="DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
)
