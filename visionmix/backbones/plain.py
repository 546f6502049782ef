"""The plain skeleton: one resolution from the stem to the head, as in ViT."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates, to_2tuple
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from visionmix.backbones.block import TokenBlock
from visionmix.backbones.contract import (
    Backbone,
    MixerSpec,
    build_mixer,
    check_output_format,
    mixer_per_block,
    one_each,
    set_grid_size,
    with_ratio,
)
from visionmix.layers import ClassToken, ConvStem, PositionEmbedding, TokenHead, swiglu
from visionmix.layers.grid import Grid, split_prefix

_NORM = partial(LayerNorm, eps=1e-6)
_HEAD = partial(ClassifierHead, input_fmt="NHWC")


class Plain(Backbone):
    """Stem, position embedding, class token if any, `depth` blocks, norm, average or class token, classifier.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the map
    (batch, rows, columns, embed_dim), or with a class token the sequence (batch, 1 + rows * columns, embed_dim). Any
    height and width of at least `patch_size`.

    Source: the Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a token stands for, along each side.
        stride: Pixels from one patch to the next where patches overlap, an option of the stem; None where they do not.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How tokens become one vector: timm's pooling types; with a class token "token" or "avg"; "" for
            none.
        embed_dim: Channels of the tokens.
        depth: Number of blocks.
        num_heads: Heads of every mixer that has heads.
        mixer: Token mixer of the blocks: a name of `visionmix.list_mixers()`, ``dict(name=..., options)``, or a list of
            those, taken in turn.
        stem_layer: Makes the stem from (in_chans, embed_dim, patch_size).
        block_layer: Makes a block, as `visionmix.backbones.block.TokenBlock` is made, or a list with one entry a block.
        mlp_layer: Makes a feed-forward from the width; None for blocks without one.
        mlp_ratio: Hidden width of the feed-forwards over the width; None for what `mlp_layer` takes by itself.
        norm_layer: Makes a norm over channels from the width.
        final_norm_layer: Makes the norm behind the last block; None for `norm_layer`.
        pos_embed: Makes the position embedding added after the stem from (dim, grid_size); None for none.
        class_token: Where among the tokens a class token goes, "first" or "middle"; None for none.
        head_layer: Makes the classifier's head, as timm's `ClassifierHead` is made; None for that one, or with a class
            token for `visionmix.layers.TokenHead`.
        layer_scale: Initial value of the blocks' learned scales, or None for none.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: a mixer or one of its options is unknown, sizes do not fit, or there is a class token and a mixer
            that reads whole maps only.
    """

    has_class_token: Final[bool]

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
        num_heads: int = 3,
        mixer: MixerSpec | list[MixerSpec] = "gated_linear_attention",
        stem_layer: Callable[..., nn.Module] = ConvStem,
        block_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = TokenBlock,
        mlp_layer: Callable[..., nn.Module] | None = swiglu,
        mlp_ratio: float | None = None,
        norm_layer: Callable[..., nn.Module] = _NORM,
        final_norm_layer: Callable[..., nn.Module] | None = None,
        pos_embed: Callable[..., nn.Module] | None = PositionEmbedding,
        class_token: str | None = None,
        head_layer: Callable[..., nn.Module] | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        height, width = to_2tuple(img_size)
        if min(height, width) < patch_size:
            raise ValueError(f"img_size={img_size} is smaller than patch_size={patch_size}; enlarge the images")
        self.patch_size = patch_size
        overlap = {} if stride is None else {"stride": stride}
        self.stem = stem_layer(in_chans, embed_dim, patch_size, **overlap, **dd)
        self.grid_size = grid_size = self.stem.grid_size(height, width)
        self.pos_embed = pos_embed(embed_dim, grid_size, **dd) if pos_embed else nn.Identity()
        self.has_class_token = class_token is not None
        self.num_prefix_tokens = int(self.has_class_token)
        self.output_fmt = "NHWC"
        head = head_layer or _HEAD
        if class_token is not None:
            self.class_token = ClassToken(embed_dim, class_token, **dd)
            self.output_fmt = "NLC"
            head = head_layer or partial(TokenHead, place=class_token)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        specs = mixer_per_block(mixer, depth)
        self.blocks = nn.ModuleList(
            layer(
                build_mixer(spec, embed_dim, num_heads=num_heads, grid_size=grid_size, **dd),
                embed_dim,
                mlp_layer=with_ratio(mlp_layer, mlp_ratio),
                norm_layer=norm_layer,
                drop_path=rate,
                layer_scale=layer_scale,
                **dd,
            )
            for layer, spec, rate in zip(
                one_each(block_layer, depth, "block_layer", "block"), specs, rates, strict=True
            )
        )
        for index, (block, spec) in enumerate(zip(self.blocks, specs, strict=True)):
            if self.has_class_token and not block.mixes_tokens:
                raise ValueError(
                    f"block {index} with mixer={spec!r} reads whole maps and cannot serve beside a class token; give "
                    "class_token=None and global_pool='avg', or a mixer with forward_tokens and no tail_layer"
                )
        self.norm = (final_norm_layer or norm_layer)(embed_dim, **dd)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stride or patch_size, "module": f"blocks.{index}"}
            for index in range(depth)
        ]
        self._finish(
            embed_dim,
            head_layer=head,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            min_size=patch_size,
            **dd,
        )

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
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make `img_size` the size that size-tied tensors are stored at, by resampling them once.

        Windows and stripes that follow the map are set for it too, so that logits of such models change.
        """
        self.grid_size = self.stem.grid_size(*to_2tuple(img_size))
        set_grid_size(self, self.grid_size)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: the stem with the embeddings, each block, the last norm."""
        return {"stem": r"^stem|^pos_embed|^class_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Return the tokens (batch, tokens, embed_dim) that the first block receives, and where they lie."""
        x = self.pos_embed(self.stem(self.check(x)))
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        prefix = torch.jit.annotate(list[int], [])
        if self.has_class_token:
            prefix = [self.class_token.position(height * width)]
            x = self.class_token(x)
        return x, Grid(height, width, prefix, None)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised tokens of images (batch, in_chans, height, width).

        A map (batch, rows, columns, embed_dim); with a class token a sequence (batch, 1 + rows * columns, embed_dim).
        """
        x, grid = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        x = self.norm(x)
        return x if self.has_class_token else x.unflatten(1, (grid.height, grid.width))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps after the chosen blocks, alone or behind the result of `forward_features`.

        Args:
            x: Images (batch, in_chans, height, width).
            indices: Which blocks: their numbers, how many of the last, or None for all.
            norm: Whether to apply the last norm to every map.
            stop_early: Whether to skip the blocks behind the last chosen one.
            output_fmt: Axes of the maps, "NCHW" or "NHWC".
            intermediates_only: Whether to return the maps alone.
            return_prefix_tokens: Whether each map comes in a pair with the class token (batch, 1, embed_dim).

        Raises:
            ValueError: `output_fmt` is neither.
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        maps = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if index in take:
                cells, prefix = split_prefix(self.norm(x) if norm else x, grid)
                cells = cells.unflatten(1, (grid.height, grid.width))
                taken = cells if output_fmt == "NHWC" else cells.permute(0, 3, 1, 2)
                maps.append((taken, prefix) if return_prefix_tokens else taken)
        if intermediates_only:
            return maps
        x = self.norm(x)
        return (x if self.has_class_token else x.unflatten(1, (grid.height, grid.width))), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices=...)` does not need; return the block numbers that `indices` are."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self._prune_head()
        return take
