"""The hierarchical skeleton: stages of falling resolution, as in ConvNeXt and Swin."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionmix.backbones.block import Block
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
from visionmix.layers import ConvDownsample, ConvStem, swiglu

_NORM = partial(LayerNorm, eps=1e-5)
_STEM = partial(ConvStem, act_layer=nn.GELU)
_HEAD = partial(ClassifierHead, input_fmt="NHWC")


class Stage(nn.Module):
    """A downsampler, a position embedding and blocks, on maps: the unit that a family may replace as a whole.

    Shapes: (batch, height, width, in_dim) to (batch, rows, columns, dim).

    Args:
        downsample: Reduces the map and sets its width; None in the first stage.
        blocks: The blocks, each from and to (batch, rows, columns, dim).
        pos_embed: Added behind the downsampler; None for none.
        norm: Behind the last block; None for none.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        pos_embed: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.pos_embed = pos_embed or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class Hierarchical(Backbone):
    """Stem, stages, norm, average over the last map, classifier.

    A stage is a downsampler (none in the first), a position embedding, blocks and a norm; an option that says "one for
    all stages or a list" may differ from stage to stage.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the last stage's map
    (batch, rows, columns, embed_dims[-1]). Any height and width of at least `patch_size`.

    Source: the four-stage layout of Swin (Liu et al. 2021, arXiv 2103.14030), with the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a token of the first stage stands for, along each side; every later stage doubles it.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How the last map becomes one vector: timm's pooling types, "" for none.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads, in each stage, of mixers that have heads.
        mixer: Token mixer: a name of `visionmix.list_mixers()` or ``dict(name=..., options)`` for all stages, or a list
            with one entry a stage, each of those or a list of those, taken in turn by the stage's blocks.
        stem_layer: Makes the stem from (in_chans, embed_dims[0], patch_size).
        downsample_layer: Makes a downsampler from (dim, out_dim).
        pos_embed: Makes a position embedding from (dim, grid_size), added behind stem and downsampler; None for none.
            One for all stages or a list.
        block_layer: Makes a block, as `visionmix.backbones.block.Block` is made. One for all stages or a list.
        mlp_layer: Makes a feed-forward from the width; None for blocks without one. One for all stages or a list.
        mlp_ratio: Hidden width of the feed-forwards over the width; None for what `mlp_layer` takes by itself.
        norm_layer: Makes a norm over channels from the width.
        stage_norm: Whether every stage ends in a norm.
        final_norm: Whether a norm follows the last stage.
        head_layer: Makes the classifier's head, as timm's `ClassifierHead` is made; one that projects before the
            classifier has that width as `hidden_size`.
        layer_scale: Initial value of the blocks' learned scales, or None for none.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: a mixer or one of its options is unknown, or the lists differ in length.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mixer: MixerSpec | list[MixerSpec | list[MixerSpec]] = "gated_linear_attention",
        stem_layer: Callable[..., nn.Module] = _STEM,
        downsample_layer: Callable[..., nn.Module] = ConvDownsample,
        pos_embed: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module] | None] | None = None,
        block_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = Block,
        mlp_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module] | None] | None = swiglu,
        mlp_ratio: float | None = None,
        norm_layer: Callable[..., nn.Module] = _NORM,
        stage_norm: bool = False,
        final_norm: bool = True,
        head_layer: Callable[..., nn.Module] = _HEAD,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        stages = len(depths)
        if not len(embed_dims) == len(num_heads) == stages:
            raise ValueError(
                f"embed_dims={tuple(embed_dims)}, depths={tuple(depths)} and num_heads={tuple(num_heads)} differ in "
                "length; give one entry a stage"
            )
        mixers = one_each(mixer, stages, "mixer")
        embeddings = one_each(pos_embed, stages, "pos_embed")
        block_layers = one_each(block_layer, stages, "block_layer")
        mlp_layers = [with_ratio(each, mlp_ratio) for each in one_each(mlp_layer, stages, "mlp_layer")]
        height, width = to_2tuple(img_size)
        if min(height, width) < patch_size:
            raise ValueError(f"img_size={img_size} is smaller than patch_size={patch_size}; enlarge the images")
        self.patch_size = patch_size
        self.stem = stem_layer(in_chans, embed_dims[0], patch_size, **dd)
        grid_size = self.stem.grid_size(height, width)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        built = []
        for index, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            downsample = downsample_layer(embed_dims[index - 1], dim, **dd) if index else None
            if downsample is not None:
                grid_size = downsample.grid_size(*grid_size)
            blocks = [
                block_layers[index](
                    build_mixer(spec, dim, num_heads=heads, grid_size=grid_size, **dd),
                    dim,
                    mlp_layer=mlp_layers[index],
                    norm_layer=norm_layer,
                    drop_path=rate,
                    layer_scale=layer_scale,
                    **dd,
                )
                for spec, rate in zip(mixer_per_block(mixers[index], depth), rates[index], strict=True)
            ]
            embedding = embeddings[index]
            built.append(
                Stage(
                    downsample,
                    blocks,
                    pos_embed=embedding(dim, grid_size, **dd) if embedding else None,
                    norm=norm_layer(dim, **dd) if stage_norm else None,
                )
            )
        self.stages = nn.ModuleList(built)
        self.norm = norm_layer(embed_dims[-1], **dd) if final_norm else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(embed_dims)
        ]
        self._finish(
            embed_dims[-1],
            head_layer=head_layer,
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
        reduction = options.get("patch_size", 4) << (len(options["depths"]) - 1)
        return -(-size[0] // reduction), -(-size[1] // reduction)

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> int | tuple[int, ...]:
        """Return what `features_only=True` gives unless told otherwise: every stage's map."""
        return tuple(range(len(options["depths"])))

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make `img_size` the size that size-tied tensors are stored at, by resampling them once.

        Windows and stripes that follow the map are set for it too, so that logits of such models change.
        """
        grid_size = self.stem.grid_size(*to_2tuple(img_size))
        for index, stage in enumerate(self.stages):
            if index:
                grid_size = stage.downsample.grid_size(*grid_size)
            set_grid_size(stage, grid_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass of every block for its activations."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: the stem, each downsampler and block (each stage, if `coarse`), the last norm."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.pos_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99998,)),
                (r"^norm", (99999,)),
            ]
        )
        return {"stem": r"^stem", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised last map (batch, rows, columns, embed_dims[-1])."""
        x = self.stem(self.check(x))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

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
        """Return the maps of the chosen stages, alone or behind the result of `forward_features`.

        Args:
            x: Images (batch, in_chans, height, width).
            indices: Which stages: their numbers, how many of the last, or None for all.
            norm: Whether to apply the last norm to the last stage's map; other maps have widths of their own.
            stop_early: Whether to skip the stages behind the last chosen one.
            output_fmt: Axes of the maps, "NCHW" or "NHWC".
            intermediates_only: Whether to return the maps alone.

        Raises:
            ValueError: `output_fmt` is neither.
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        x = self.stem(self.check(x))
        maps = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                taken = self.norm(x) if norm and index == final else x
                maps.append(taken if output_fmt == "NHWC" else taken.permute(0, 3, 1, 2))
        return maps if intermediates_only else (self.norm(x), maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices=...)` does not need; return the stage numbers that `indices` are."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self._prune_head()
        return take
