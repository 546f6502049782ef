"""The hierarchical skeleton: stages of falling resolution, as in ConvNeXt and Swin."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones.block import Block
from visionmix.backbones.building import build_blocks, mlp_maker
from visionmix.backbones.contract import (
    Backbone,
    MixerSpec,
    check_integers,
    check_lists,
    check_mixer,
    check_rates,
    heads_for,
    image_sides,
    per_stage,
    set_grid_size,
)
from visionmix.layers import ConvDownsample, conv_stem, swiglu
from visionmix.layers.by_name import LayerSpec, layer_maker
from visionmix.registry import factory_kwargs

_NORM = partial(LayerNorm, eps=1e-5)
_STEM = partial(conv_stem, act_layer=nn.GELU)
_HEAD = partial(ClassifierHead, input_fmt="NHWC")
_EachStage = LayerSpec | Sequence[LayerSpec]


class Stage(nn.Module):
    """A downsampler, a position embedding and blocks, on maps: a unit that a family may replace as a whole.

    Shapes: (batch, height, width, in_dim) to (batch, rows, columns, dim).

    Every stage of a pass receives the same list, `carry`, empty before the first: a family's own stage may leave
    tensors in it for later stages.

    Args:
        downsample: Reduces the map and sets its width; None in the first stage.
        blocks: The blocks, each from and to (batch, rows, columns, dim).
        pos_embed: Added after the downsampler; None for none.
        norm: Applied after the last block; None for none.
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
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)


class Hierarchical(Backbone):
    """Stem, stages, norm, average over the last map, classifier.

    A stage is a downsampler (none in the first), a position embedding, blocks and a norm. An option that says "one per
    stage" takes one for all stages or a list with an entry per stage. A layer is given by name, by ``dict(name=...,
    options)`` or as a callable; the names are those of `visionmix.layers.by_name.layer_names`.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the last stage's map
    (batch, rows, columns, embed_dims[-1]). Any height and width of at least `patch_size`.

    Source: the four-stage layout of Swin (Liu et al. 2021, arXiv 2103.14030), with the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a token of the first stage stands for, along each side.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How the last map becomes one vector: timm's pooling types, "" for none.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads, in each stage, of mixers that have heads; None for heads about 32 channels wide.
        mixer: Token mixer: a name of `visionmix.list_mixers()` or ``dict(name=..., options)`` for all stages, or a list
            with an entry per stage: one of those, a list of those with an entry per block, or ``dict(cycle=[...])``,
            whose entries the blocks take in turn.
        stem_layer: Makes the stem from (in_chans, embed_dims[0], patch_size).
        downsample_layer: Makes a downsampler from (dim, out_dim). One per stage; the first stage has none.
        pos_embed: Makes a position embedding from (dim, grid_size), added after stem and downsampler; None for none.
            One per stage.
        stage_layer: Makes a stage, as `Stage` is made. One per stage.
        block_layer: Makes a block, as `visionmix.backbones.Block` is made. One per stage, or a list with one per block.
        mlp_layer: Makes a feed-forward from the width; None for blocks without one. One per stage.
        mlp_ratio: Hidden width of the feed-forwards over the width; None for the default of `mlp_layer`.
        act_layer: Activation of the feed-forwards: a name such as "relu", or a class; None for that of `mlp_layer`.
        norm_layer: Makes a norm over channels from the width. One per stage.
        stage_norm_layer: Makes the layer that every stage ends in from the width; "same" for the stage's `norm_layer`,
            None for nothing. One per stage.
        final_norm_layer: Makes the norm after the last stage; "same" for the last stage's `norm_layer`, None for none.
        head_layer: Makes the classifier's head, as timm's `ClassifierHead` is made; one that projects before the
            classifier has that width as `hidden_size`.
        layer_scale: Initial value of the blocks' learned scales, or None for none. One per stage.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of what mixers return and inside feed-forwards.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.

    Raises:
        TypeError: a mixer or a layer is of a wrong type.
        ValueError: a mixer, a layer or one of its options is unknown, or the lists differ in length.
    """

    units: ClassVar[str] = "stages"
    norms_every_unit: ClassVar[bool] = False

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
        num_heads: Sequence[int] | None = None,
        mixer: MixerSpec | list[MixerSpec | list[MixerSpec]] = "gated_linear_attention",
        stem_layer: LayerSpec = _STEM,
        downsample_layer: _EachStage = ConvDownsample,
        pos_embed: _EachStage = None,
        stage_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = Stage,
        block_layer: Callable[..., nn.Module] | Sequence[Any] = Block,
        mlp_layer: _EachStage = swiglu,
        mlp_ratio: float | None = None,
        act_layer: LayerSpec = None,
        norm_layer: _EachStage = _NORM,
        stage_norm_layer: _EachStage = None,
        final_norm_layer: LayerSpec = "same",
        head_layer: LayerSpec = _HEAD,
        layer_scale: float | Sequence[float | None] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = factory_kwargs(device, dtype)
        check_lists(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        check_integers(1, in_chans=in_chans, patch_size=patch_size, embed_dims=embed_dims, num_heads=num_heads)
        check_integers(0, num_classes=num_classes, depths=depths)
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        check_rates(**rates, drop_path_rate=drop_path_rate)
        stages = len(depths)
        num_heads = [heads_for(dim) for dim in embed_dims] if num_heads is None else num_heads
        if not len(embed_dims) == len(num_heads) == stages:
            raise ValueError(
                f"embed_dims={tuple(embed_dims)}, depths={tuple(depths)} and num_heads={tuple(num_heads)} differ in "
                "length; give one entry per stage"
            )
        check_mixer(mixer, nested=2)
        height, width = image_sides(img_size, patch_size)

        def makers(kind: str, value: _EachStage, option: str) -> list:
            return [
                each if each == "same" else layer_maker(kind, each, option) for each in per_stage(value, stages, option)
            ]

        downsamplers = makers("downsample_layer", downsample_layer, "downsample_layer")
        embeddings = makers("pos_embed", pos_embed, "pos_embed")
        norms = makers("norm_layer", norm_layer, "norm_layer")
        stage_norms = makers("norm_layer", stage_norm_layer, "stage_norm_layer")
        mlps = [
            mlp_maker(each, mlp_ratio, act_layer, proj_drop_rate) for each in per_stage(mlp_layer, stages, "mlp_layer")
        ]
        stage_layers = per_stage(stage_layer, stages, "stage_layer")
        block_layers = per_stage(block_layer, stages, "block_layer")
        mixers = per_stage(mixer, stages, "mixer")
        scales = per_stage(layer_scale, stages, "layer_scale")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.patch_size = patch_size
        self.stem = layer_maker("stem_layer", stem_layer)(in_chans, embed_dims[0], patch_size, **dd)
        grid_size, reduction = self.stem.grid_size(height, width), self.stem.stride
        self.stages = nn.ModuleList()
        self.feature_info = []
        for index, dim in enumerate(embed_dims):
            if index and downsamplers[index] is None:
                raise ValueError(f"downsample_layer: stage {index} has none; give one, such as 'conv'")
            downsample = downsamplers[index](embed_dims[index - 1], dim, **dd) if index else None
            if downsample is not None:
                grid_size, reduction = downsample.grid_size(*grid_size), reduction * downsample.stride
            drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
            options = {"mlp_layer": mlps[index], "norm_layer": norms[index], "layer_scale": scales[index], **dd}
            places = {"num_heads": num_heads[index], "grid_size": grid_size, "where": f" of stage {index}"}
            blocks = build_blocks(dim, block_layers[index], mixers[index], rates[index], **places, **drops, **options)
            embedding = embeddings[index]
            norm = norms[index] if stage_norms[index] == "same" else stage_norms[index]
            self.stages.append(
                stage_layers[index](
                    downsample,
                    blocks,
                    pos_embed=embedding(dim, grid_size, **dd) if embedding else None,
                    norm=norm(dim, **dd) if norm else None,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{index}"})
        final = (
            norms[-1] if final_norm_layer == "same" else layer_maker("norm_layer", final_norm_layer, "final_norm_layer")
        )
        self.norm = final(embed_dims[-1], **dd) if final else nn.Identity()
        head = layer_maker("head_layer", head_layer)
        self._finish(embed_dims[-1], head, patch_size, in_chans, num_classes, global_pool, drop_rate, **dd)

    @staticmethod
    def last_grid(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the last map of images of `size`, in a model built with `options`.

        Every stage but the first is taken to halve the map.
        """
        reduction = options.get("patch_size", 4) << (len(options["depths"]) - 1)
        return -(-size[0] // reduction), -(-size[1] // reduction)

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> int | tuple[int, ...]:
        """Return what `features_only=True` gives unless told otherwise: every stage's map."""
        check_lists(depths=options["depths"])
        return tuple(range(len(options["depths"])))

    @torch.jit.ignore
    def _resize(self, height: int, width: int) -> tuple[int, int]:
        grid_size = self.stem.grid_size(height, width)
        for index, stage in enumerate(self.stages):
            if index:
                grid_size = stage.downsample.grid_size(*grid_size)
            set_grid_size(stage, grid_size)
        return grid_size

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
                (r"^stages\.(\d+)\.", (99998,)),
                (r"^norm", (99999,)),
            ]
        )
        return {"stem": r"^stem", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised last map (batch, rows, columns, embed_dims[-1])."""
        x = self.stem(self.check(x))
        carry = torch.jit.annotate(list[Tensor], [])
        for stage in self.stages:
            x = stage(x, carry)
        return self.norm(x)

    @torch.jit.ignore
    def _enter(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.stem(self.check(x)), []

    @torch.jit.ignore
    def _advance(self, unit: nn.Module, state: tuple[Tensor, list[Tensor]], index: int) -> tuple[Tensor, list[Tensor]]:
        x, carry = state
        return unit(x, carry), carry

    @torch.jit.ignore
    def _cells(self, state: tuple[Tensor, list[Tensor]], norm: bool) -> tuple[Tensor, Tensor]:
        x, _ = state
        return self.norm(x) if norm else x, x.flatten(1, 2)[:, :0]

    @torch.jit.ignore
    def _leave(self, state: tuple[Tensor, list[Tensor]]) -> Tensor:
        return self.norm(state[0])
