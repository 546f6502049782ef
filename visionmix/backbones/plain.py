"""The plain skeleton: one resolution from the stem to the head, as in ViT."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, calculate_drop_path_rates, to_2tuple
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
)
from visionmix.backbones.grid import Grid
from visionmix.layers import ConvStem, PositionEmbedding, swiglu

_NORM = partial(LayerNorm, eps=1e-6)


class Plain(Backbone):
    """Stem, position embedding, `depth` blocks, norm, average over tokens, classifier.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the map
    (batch, rows, columns, embed_dim). Any height and width of at least `patch_size`.

    Source: the Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a token stands for, along each side.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How tokens become one vector: timm's pooling types, "" for none.
        embed_dim: Channels of the tokens.
        depth: Number of blocks.
        num_heads: Heads of every mixer that has heads.
        mixer: Token mixer of the blocks: a name of `visionmix.list_mixers()`, ``dict(name=..., options)``, or a list of
            those, taken in turn.
        stem_layer: Makes the stem from (in_chans, embed_dim, patch_size).
        mlp_layer: Makes a feed-forward from the width; None for blocks without one.
        norm_layer: Makes a norm over channels from the width.
        pos_embed: Whether to add a learned position embedding after the stem.
        layer_scale: Initial value of the blocks' learned scales, or None for none.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: a mixer or one of its options is unknown, or sizes do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mixer: MixerSpec | list[MixerSpec] = "gated_linear_attention",
        stem_layer: Callable[..., nn.Module] = ConvStem,
        mlp_layer: Callable[..., nn.Module] | None = swiglu,
        norm_layer: Callable[..., nn.Module] = _NORM,
        pos_embed: bool = True,
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
        self.stem = stem_layer(in_chans, embed_dim, patch_size, **dd)
        grid_size = self.stem.grid_size(height, width)
        self.pos_embed = PositionEmbedding(embed_dim, grid_size, **dd) if pos_embed else nn.Identity()
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            TokenBlock(
                build_mixer(spec, embed_dim, num_heads=num_heads, **dd),
                embed_dim,
                mlp_layer=mlp_layer,
                norm_layer=norm_layer,
                drop_path=rate,
                layer_scale=layer_scale,
                **dd,
            )
            for spec, rate in zip(mixer_per_block(mixer, depth), rates, strict=True)
        )
        self.norm = norm_layer(embed_dim, **dd)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self._finish(
            embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            min_size=patch_size,
            **dd,
        )

    @staticmethod
    def total_reduction(options: Mapping[str, Any]) -> int:
        """Return the pixels a side that a cell of the last map stands for, in a model built with `options`."""
        return options.get("patch_size", 16)

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> int | tuple[int, ...]:
        """Return what `features_only=True` gives unless told otherwise: the maps after the last three blocks."""
        return 3

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make `img_size` the size that the position embedding is stored at, by resampling it once."""
        if isinstance(self.pos_embed, PositionEmbedding):
            self.pos_embed.set_grid_size(self.stem.grid_size(*to_2tuple(img_size)))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: the stem with the position embedding, each block, the last norm."""
        return {"stem": r"^stem|^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def _embed(self, x: Tensor) -> Tensor:
        return self.pos_embed(self.stem(self.check(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map (batch, rows, columns, embed_dim) of images (batch, in_chans, height, width)."""
        x = self._embed(x)
        batch, height, width, dim = x.shape
        grid = Grid(height, width, [], None)
        x = x.reshape(batch, height * width, dim)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.norm(x).reshape(batch, height, width, dim)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps after the chosen blocks, alone or behind the result of `forward_features`.

        Args:
            x: Images (batch, in_chans, height, width).
            indices: Which blocks: their numbers, how many of the last, or None for all.
            norm: Whether to apply the last norm to every map.
            stop_early: Whether to skip the blocks behind the last chosen one.
            output_fmt: Axes of the maps, "NCHW" or "NHWC".
            intermediates_only: Whether to return the maps alone.

        Raises:
            ValueError: `output_fmt` is neither.
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        batch, height, width, dim = x.shape
        grid = Grid(height, width, [], None)
        x = x.reshape(batch, height * width, dim)
        maps = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if index in take:
                taken = (self.norm(x) if norm else x).reshape(batch, height, width, dim)
                maps.append(taken if output_fmt == "NHWC" else taken.permute(0, 3, 1, 2))
        return maps if intermediates_only else (self.norm(x).reshape(batch, height, width, dim), maps)

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
            self.reset_classifier(0, "")
        return take
