"""The plain skeleton: one resolution from the stem to the head, as in ViT."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones.block import Block, TokenBlock
from visionmix.backbones.building import build_blocks, mlp_maker
from visionmix.backbones.contract import (
    Backbone,
    MixerSpec,
    check_integers,
    check_mixer,
    check_rates,
    heads_for,
    image_sides,
    set_grid_size,
)
from visionmix.backbones.intermediates import chosen_units
from visionmix.layers import PositionEmbedding, PrefixTokens, TokenHead, conv_stem, swiglu
from visionmix.layers.by_name import NONE, LayerSpec, layer_maker
from visionmix.layers.grid import Grid, split_prefix
from visionmix.registry import constructor_options, factory_kwargs, nearest

_NORM = partial(LayerNorm, eps=1e-6)
_HEAD = partial(ClassifierHead, input_fmt="NHWC")


class Plain(Backbone):
    """Stem, position embedding, prefix tokens if any, `depth` blocks, norm, pooling, classifier.

    Blocks see the map (batch, rows, columns, embed_dim); with prefix tokens (class tokens, registers) they see the
    sequence of the cells and these. A layer is given by name, by ``dict(name=..., options)`` or as a callable; the
    names are those of `visionmix.layers.by_name.layer_names`.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the map
    (batch, rows, columns, embed_dim), or with `count` prefix tokens the sequence (batch, count + rows * columns,
    embed_dim). Any height and width of at least `patch_size`.

    Source: the Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a token stands for, along each side.
        stride: Pixels from one patch to the next where patches overlap, an option of the stem; None where they do not.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How tokens become one vector: timm's pooling types; with prefix tokens those of
            `visionmix.layers.TokenHead`, "token" among them; "" for none.
        embed_dim: Channels of the tokens.
        depth: Number of blocks.
        num_heads: Heads of every mixer that has heads; None for heads about 32 channels wide.
        mixer: Token mixer of the blocks: a name of `visionmix.list_mixers()`, ``dict(name=..., options)``, a list of
            those with an entry per block, or ``dict(cycle=[...])``, whose entries the blocks take in turn.
        stem_layer: Makes the stem from (in_chans, embed_dim, patch_size).
        block_layer: Makes a block, as `visionmix.backbones.Block` is made, or with prefix tokens as
            `visionmix.backbones.TokenBlock`; None for these; or a list with an entry per block.
        mlp_layer: Makes a feed-forward from the width; None for blocks without one.
        mlp_ratio: Hidden width of the feed-forwards over the width; None for the default of `mlp_layer`.
        act_layer: Activation of the feed-forwards: a name such as "relu", or a class; None for that of `mlp_layer`.
        norm_layer: Makes a norm over channels from the width.
        final_norm_layer: Makes the norm after the last block; "same" for `norm_layer`, None for none.
        pos_embed: Makes the position embedding added after the stem from (dim, grid_size); None for none.
        prefix_tokens: Tokens that are not cells: the place of one class token, "first", "middle" or "last", or
            ``dict(count=..., place=..., positioned=...)``, where a place may be "evenly" too; None for none. See
            `visionmix.layers.PrefixTokens`.
        prefix: How mixers treat prefix tokens: "mix" mixes them with the cells, which takes a mixer with
            `forward_tokens`; "pass" lets them go past any mixer, which then mixes the cells alone.
        head_layer: Makes the classifier's head, as timm's `ClassifierHead` is made; None for that one, or with prefix
            tokens for `visionmix.layers.TokenHead`. With prefix tokens it is given their `count` and `place`.
        layer_scale: Initial value of the blocks' learned scales, or None for none.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of what mixers return and inside feed-forwards.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.

    Raises:
        TypeError: a mixer or a layer is of a wrong type.
        ValueError: a mixer, a layer or one of its options is unknown, sizes or lists do not fit, or there are prefix
            tokens and a mixer or feed-forward that reads whole maps only.
    """

    units: ClassVar[str] = "blocks"
    norms_every_unit: ClassVar[bool] = True
    has_prefix: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        stride: int | None = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int | None = None,
        mixer: MixerSpec | list[MixerSpec] = "gated_linear_attention",
        stem_layer: LayerSpec = conv_stem,
        block_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] | None = None,
        mlp_layer: LayerSpec = swiglu,
        mlp_ratio: float | None = None,
        act_layer: LayerSpec = None,
        norm_layer: LayerSpec = _NORM,
        final_norm_layer: LayerSpec = "same",
        pos_embed: LayerSpec = PositionEmbedding,
        prefix_tokens: str | Mapping[str, Any] | None = None,
        prefix: str = "mix",
        head_layer: LayerSpec = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = factory_kwargs(device, dtype)
        check_mixer(mixer)
        check_integers(
            1,
            in_chans=in_chans,
            patch_size=patch_size,
            stride=stride,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        check_integers(0, num_classes=num_classes)
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        check_rates(**rates, drop_path_rate=drop_path_rate)
        height, width = image_sides(img_size, patch_size)
        if prefix not in ("mix", "pass"):
            raise ValueError(f"prefix={prefix!r} is unknown; give 'mix' or 'pass'")
        norm = layer_maker("norm_layer", norm_layer)
        embedding = layer_maker("pos_embed", pos_embed)
        mlp = mlp_maker(mlp_layer, mlp_ratio, act_layer, proj_drop_rate)
        heads = heads_for(embed_dim) if num_heads is None else num_heads

        self.patch_size = patch_size
        make_stem = layer_maker("stem_layer", stem_layer)
        overlap = {} if stride is None else {"stride": stride}
        if overlap and "stride" not in inspect.signature(make_stem).parameters:
            raise ValueError(f"stride={stride} is no option of the stem; leave it out, or give stem_layer='patch'")
        self.stem = make_stem(in_chans, embed_dim, patch_size, **overlap, **dd)
        self.grid_size = grid_size = self.stem.grid_size(height, width)
        self.pos_embed = embedding(embed_dim, grid_size, **dd) if embedding else nn.Identity()
        self.embed_dim = embed_dim
        prefix_tokens = None if prefix_tokens == NONE else prefix_tokens
        self.has_prefix = prefix_tokens is not None
        self.num_prefix_tokens = 0
        self.output_fmt = "NHWC"
        default, head = Block, layer_maker("head_layer", head_layer) or _HEAD
        if prefix_tokens is not None:
            tokens = _prefix_options(prefix_tokens)
            self.class_token = PrefixTokens(embed_dim, **tokens, **dd)
            self.num_prefix_tokens = self.class_token.count
            self.output_fmt = "NLC"
            default = partial(TokenBlock, prefix=prefix)
            where = {"count": self.class_token.count, "place": self.class_token.place}
            head = partial(layer_maker("head_layer", head_layer) or TokenHead, **where)
        rates = calculate_drop_path_rates(drop_path_rate, int(depth))
        options = {"mlp_layer": mlp, "norm_layer": norm, "layer_scale": layer_scale, **dd}
        places = {"num_heads": heads, "grid_size": grid_size, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        self.blocks = nn.ModuleList(build_blocks(embed_dim, block_layer or default, mixer, rates, **places, **options))
        for index, block in enumerate(self.blocks):
            if self.has_prefix and len(inspect.signature(block.forward).parameters) < 2:
                raise ValueError(
                    f"block {index}, a {type(block).__qualname__}, reads whole maps and cannot serve beside prefix "
                    "tokens; give prefix_tokens='none' and global_pool='avg', or another block_layer"
                )
        final = norm if final_norm_layer == "same" else layer_maker("norm_layer", final_norm_layer, "final_norm_layer")
        self.norm = final(embed_dim, **dd) if final else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stem.stride, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self._finish(embed_dim, head, patch_size, in_chans, num_classes, global_pool, drop_rate, **dd)

    @staticmethod
    def last_grid(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the last map of images of `size`, in a model built with `options`."""
        patch, stride = options.get("patch_size", 16), options.get("stride")
        if stride is None:
            return -(-size[0] // patch), -(-size[1] // patch)
        return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> int | tuple[int, ...]:
        """Return what `features_only=True` gives unless told otherwise: the maps after the last three blocks."""
        return 3

    @torch.jit.ignore
    def _resize(self, height: int, width: int) -> tuple[int, int]:
        self.grid_size = self.stem.grid_size(height, width)
        set_grid_size(self, self.grid_size)
        return self.grid_size

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: the stem with the embeddings, each block, the last norm."""
        return {"stem": r"^stem|^pos_embed|^class_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Return the sequence (batch, tokens, embed_dim) of cells and prefix tokens, and where they lie."""
        x = self.pos_embed(self.stem(self.check(x)))
        height, width = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        positions = torch.jit.annotate(list[int], [])
        if self.has_prefix:
            positions = self.class_token.positions(height * width)
            x = self.class_token(x)
        return x, Grid(height, width, positions, None)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised features of images (batch, in_chans, height, width).

        A map (batch, rows, columns, embed_dim); with prefix tokens a sequence (batch, count + rows * columns,
        embed_dim).
        """
        if self.has_prefix:
            x, grid = self.embed(x)
            for block in self.blocks:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid)
                else:
                    x = block(x, grid)
        else:
            x = self.pos_embed(self.stem(self.check(x)))
            for block in self.blocks:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
        return self.norm(x)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """Return the cells after the last `n` blocks, or after those numbered `n`, as timm's VisionTransformer does.

        Args:
            x: Images (batch, in_chans, height, width).
            n: How many of the last blocks, or their numbers.
            reshape: Whether to return maps (batch, embed_dim, rows, columns) rather than (batch, cells, embed_dim).
            return_prefix_tokens: Whether each comes in a pair with the prefix tokens (batch, count, embed_dim).
            norm: Whether to apply the last norm.

        Raises:
            TypeError: `n` is no integer and no list of integers.
            ValueError: there are not so many blocks.
        """
        chosen_units(len(self.blocks), n, self.units, "n")
        return self.forward_intermediates(
            x,
            n,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            return_prefix_tokens=return_prefix_tokens,
        )

    @torch.jit.ignore
    def _enter(self, x: Tensor) -> tuple[Tensor, Grid | None]:
        if self.has_prefix:
            return self.embed(x)
        return self.pos_embed(self.stem(self.check(x))), None

    @torch.jit.ignore
    def _advance(self, unit: nn.Module, state: tuple[Tensor, Grid | None], index: int) -> tuple[Tensor, Grid | None]:
        x, grid = state
        return self._run_unit(unit, x) if grid is None else self._run_unit(unit, x, grid), grid

    @torch.jit.ignore
    def _cells(self, state: tuple[Tensor, Grid | None], norm: bool) -> tuple[Tensor, Tensor]:
        x, grid = state
        x = self.norm(x) if norm else x
        if grid is None:
            return x, x.flatten(1, 2)[:, :0]
        cells, prefix = split_prefix(x, grid.prefix_positions)
        return cells.unflatten(1, (grid.height, grid.width)), prefix

    @torch.jit.ignore
    def _leave(self, state: tuple[Tensor, Grid | None]) -> Tensor:
        return self.norm(state[0])


def _prefix_options(prefix_tokens: Any) -> dict[str, Any]:
    """Return the options of `PrefixTokens` that `prefix_tokens`, a place or a dict, stands for.

    Raises:
        TypeError: it is neither.
        ValueError: an option is unknown.
    """
    if isinstance(prefix_tokens, str):
        return {"place": prefix_tokens}
    if not isinstance(prefix_tokens, Mapping):
        raise TypeError(
            f"prefix_tokens={prefix_tokens!r} is no place; give 'first', 'middle' or 'last', or "
            "dict(count=..., place=..., positioned=...)"
        )
    known = constructor_options(PrefixTokens, ("self", "dim"))
    for option in prefix_tokens:
        if option not in known:
            raise ValueError(
                f"prefix_tokens={prefix_tokens!r} has an unknown option {option!r}{nearest(str(option), known)}; "
                f"its options are {sorted(known)}"
            )
    return dict(prefix_tokens)
