"""STViT-R: Swin whose third stage works on a few semantic tokens and restores the map from them.

Source: STViT (Chang et al. 2023, arXiv 2303.08685); STViT-R is its form for Swin. Every six blocks of the third stage
make a group: a Swin block on the map, seeds of 3x3 semantic tokens for each of its windows, which see the cells around
their window, then the whole map and one another, and the map again, which sees them. The published code takes images of
224 pixels alone. Here maps are padded with zeros until windows fit, and the cells around a window are the 10x10 that
begin one before it, moved inwards at the border.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.fx
from timm.layers import LayerScale, use_fused_attn
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Block, Residual, Stage
from visionmix.layers import Stem, StemConv, pad
from visionmix.mixers.softmax import check_heads, softmax_attention
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.swin import swin
from visionmix.scans.cells import numbered

_SEEDS = 3  # along each side of a window
_AROUND = 3  # more cells than a window has along each side, which seeds see

_KEYS = KeyMap(
    rename=[
        (r"^stem\.conv1\.(0|2)\.(c|bn)\.", lambda m: f"stem.{'conv' if m[2] == 'c' else 'norm'}{int(m[1]) // 2 + 1}."),
        (r"\.layer_scale_(\d)$", r".scale\1.gamma"),
    ]
)


class _Attention(nn.Module):
    """Softmax attention of tokens x (..., queries, dim) to others, given by their ``key_value`` (..., keys, 2 dim)."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
        k, v = key_value.unflatten(-1, (2 * self.num_heads, -1)).transpose(-2, -3).chunk(2, dim=-3)
        return self.proj(_attended(q, k, v, self.fused_attn).transpose(-2, -3).flatten(-2))


@torch.fx.wrap
def _attended(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    # Windows are not fused: their tokens are few, and ONNX takes four axes alone.
    return softmax_attention(q, k, v, None, fused and q.dim() == 4)


class _GroupBlock(nn.Module):
    """A block on a map (batch, height, width, dim) and its semantic tokens (batch, rows, columns, dim), to both.

    Some tokens x see others: ``y = x + scale1(attention(norm1(x), norm1(seen)))``, then ``y + scale2(mlp(norm2(y)))``.
    A subclass says which are x, and which are seen.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        mixer: Not used.
        mlp_layer: Makes the feed-forward.
        norm_layer: Makes the norms.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of the learned scales; None for the published 1e-5.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mixer: Any,
        mlp_layer: Any,
        norm_layer: Any,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.seeds = _SEEDS
        initial = 1e-5 if layer_scale is None else layer_scale
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = _Attention(dim, num_heads, **dd)
        self.scale1 = Residual(dim, drop_path, initial, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, **dd)
        self.scale2 = Residual(dim, drop_path, initial, **dd)

    def seeing(self, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
        """Return x (..., tokens, dim) after the block; y is its norm, `seen` (..., others, dim) the other tokens'."""
        x = self.scale1(x, self.mixer(y, self.mixer.kv(seen)))
        return self.scale2(x, self.mlp(self.norm2(x)))


class _Seed(_GroupBlock):
    """Makes the semantic tokens: maxima over parts of each window, which see themselves and the cells around it.

    ``s = scale1(attention(norm1(p), norm1([p, cells])))`` of the maxima p, without a residual.
    """

    def __init__(self, dim: int, *, window_size: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.scale1 = LayerScale(dim, self.scale1.initial, device=options["device"], dtype=options["dtype"])
        self.window_size = window_size
        self.side = window_size + _AROUND
        # The parts of a window along each side, as adaptive pooling has them.
        self.parts = [(i * window_size // _SEEDS, -(-(i + 1) * window_size // _SEEDS)) for i in range(_SEEDS)]

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        seeds = self._maxima(_padded(x, self.window_size))
        y = self.norm1(seeds)
        # Keys and values of cells are made once, for all windows around which they stand.
        cells = self._around(self.mixer.kv(_padded(self.norm1(x), self.window_size)))
        s = self.scale1(self.mixer(y, torch.cat([self.mixer.kv(y), cells], dim=3)))
        return x, _joined(self.scale2(s, self.mlp(self.norm2(s))), self.seeds)

    def _maxima(self, x: Tensor) -> Tensor:
        """Return the maxima over parts of each window, (batch, rows, columns, seeds, dim)."""
        x = x.unflatten(2, (-1, self.window_size)).unflatten(1, (-1, self.window_size))
        rows, cells = torch.jit.annotate(list[Tensor], []), torch.jit.annotate(list[Tensor], [])
        for start, end in self.parts:
            rows.append(x[:, :, start:end].amax(dim=[2]))
        x = torch.stack(rows, dim=3)
        for start, end in self.parts:
            cells.append(x[:, :, :, :, start:end].amax(dim=[4]))
        return torch.stack(cells, dim=4).flatten(3, 4)

    def _around(self, x: Tensor) -> Tensor:
        """Return what of the map x stands around each window, (batch, rows, columns, cells, features)."""
        rows = _places(x.shape[1], self.window_size, self.side, x)
        columns = _places(x.shape[2], self.window_size, self.side, x)
        x = _taken(_taken(x, 1, rows), 2, columns)
        return x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side)).transpose(2, 3).flatten(3, 4)


class _Gather(_GroupBlock):
    """The semantic tokens see themselves and the whole map."""

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        _, rows, columns, _ = semantic.shape
        tokens = semantic.flatten(1, 2)
        y = self.norm1(tokens)
        seen = torch.cat([y, self.norm1(x).flatten(1, 2)], dim=1)
        return x, self.seeing(tokens, y, seen).unflatten(1, (rows, columns))


class _Near(_GroupBlock):
    """The semantic tokens of each window see one another."""

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        tokens = semantic.unflatten(2, (-1, self.seeds)).unflatten(1, (-1, self.seeds)).transpose(2, 3).flatten(3, 4)
        y = self.norm1(tokens)
        return x, _joined(self.seeing(tokens, y, y), self.seeds)


class _Far(_GroupBlock):
    """All semantic tokens see one another."""

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        _, rows, columns, _ = semantic.shape
        tokens = semantic.flatten(1, 2)
        y = self.norm1(tokens)
        return x, self.seeing(tokens, y, y).unflatten(1, (rows, columns))


class _Restore(_GroupBlock):
    """The map sees the semantic tokens."""

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        _, height, width, _ = x.shape
        cells = x.flatten(1, 2)
        seen = self.norm1(semantic.flatten(1, 2))
        return self.seeing(cells, self.norm1(cells), seen).unflatten(1, (height, width)), semantic


class _WindowBlock(Block):
    """`Block` on the map, past the semantic tokens."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def forward(self, x: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        x = self.scale1(x, self.mixer(self.norm1(x)))
        if self.has_mlp:
            x = self.scale2(x, self.mlp(self.norm2(x)))
        return x, semantic


class _Stage(Stage):
    """`Stage` whose blocks hand semantic tokens on from one to the next.

    Raises:
        ValueError: the blocks do not make whole groups.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], **options: Any) -> None:
        if len(blocks) % len(_GROUP):
            raise ValueError(f"the third stage has {len(blocks)} blocks; give a multiple of {len(_GROUP)} in depths")
        super().__init__(downsample, blocks, **options)

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        semantic = x[:, :0, :0]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, semantic = checkpoint(block, x, semantic)
            else:
                x, semantic = block(x, semantic)
        return self.norm(x)


_GROUP = (_WindowBlock, _Seed, _Gather, _Near, _Far, _Restore)


def _joined(x: Tensor, seeds: int) -> Tensor:
    """Return the tokens of all windows (batch, rows, columns, seeds, dim) as one map."""
    return x.unflatten(3, (seeds, seeds)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _padded(x: Tensor, side: int) -> Tensor:
    """Return the map x with zeros at the bottom and on the right until windows of `side` cells fit."""
    _, height, width, _ = x.shape
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    return pad(x, [0, 0, 0, columns * side - width, 0, rows * side - height])


@torch.fx.wrap
def _places(length: int, window: int, side: int, like: Tensor) -> Tensor:
    """Return the cells that the `side` places around each window of an axis stand for, int64 (windows * side,).

    They begin one cell before the window, or further in, so that they end with the axis.
    """
    place = numbered(length // window * side, like)
    number = place // side
    start = torch.minimum(number * window - (side - window - 1) // 2, torch.full_like(number, length - side)).clamp(
        min=0
    )
    return start + place - number * side


@torch.fx.wrap
def _taken(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Return the entries at `places` of the rows (axis 1) or columns (axis 2) of a map, zeros beyond its end."""
    length = x.shape[axis]
    inside = (places < length).unsqueeze(1)
    if axis == 1:
        inside = inside.unsqueeze(2)
    return x.index_select(axis, places.clamp(max=length - 1)) * inside


def _layout(dim: int, depth: int, heads: int, window_size: int = 7, depths: Sequence[int] | None = None) -> Layout:
    depths = depths or (2, 2, depth, 2)
    host = swin(dim, depths, heads, "SSSS", lambda stage: "softmax", partial(_same_window, window_size=window_size))
    mixers, num_heads = list(host.options["mixer"]), host.options["num_heads"][2]
    mixers[2] = {"name": "window", "window_size": window_size}
    blocks = [_WindowBlock, partial(_Seed, window_size=window_size), _Gather, _Near, _Far, _Restore]
    blocks = [each if each is _WindowBlock else partial(each, num_heads=num_heads) for each in blocks]
    return host.with_keys(_KEYS).with_options(
        mixer=mixers,
        stem_layer=_stem,
        stage_layer=[Stage, Stage, _Stage, Stage],
        block_layer=[Block, Block, {"cycle": blocks}, Block],
    )


def _same_window(side: int, window_size: int) -> int:
    """Return the window for a first map of `side` cells: the same for all (a function, since models are pickled)."""
    return window_size


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return two 3x3 convolutions of stride 2, each with a batch norm and hard swish."""
    if patch_size != 4 or embed_dim % 2:
        raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
    conv = StemConv(embed_dim // 2, 3, 2, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.Hardswish)
    return Stem(in_chans, [conv, conv._replace(channels=embed_dim)], **dd)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id="csncsn/STViT-R", file=f"STViT-R-Swin-{size}.pth", top1=top1)}


# Parameters and multiply-adds as the published logs count them.
VARIANTS = {
    "stvit_r_swin_tiny": Variant(_layout(96, 6, 3)),
    "stvit_r_swin_small": Variant(_layout(96, 18, 3), _in1k("S", 82.7), 49.6, 5.83),
    "stvit_r_swin_base": Variant(_layout(128, 18, 4), _in1k("B", 83.2), 87.8, 10.26),
    "test_stvit_r_swin": Variant(_layout(16, 6, 1, window_size=3, depths=(1, 1, 6, 1)).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2303.08685",
    paper_name="Making Vision Transformers Efficient from A Token Sparsification View",
    license="mit",
)
