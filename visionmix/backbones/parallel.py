"""The skeleton of parallel resolutions: maps at several resolutions side by side, which exchange what they hold."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

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
from visionmix.backbones.intermediates import check_output_format, chosen_units, laid_out
from visionmix.layers import ConvsDownsample, mlp, resample_map
from visionmix.layers.bottleneck import Bottleneck, BottleneckStem, conv_norm
from visionmix.layers.by_name import LayerSpec, layer_maker
from visionmix.registry import factory_kwargs

_NORM = partial(LayerNorm, eps=1e-5)
_HEAD = partial(ClassifierHead, input_fmt="NHWC")
_EachResolution = LayerSpec | Sequence[LayerSpec]


class Merge(nn.Module):
    """What one resolution takes from all: ``relu(sum over maps of their paths)``; its own map comes as it is.

    From a finer map, each halving is a depthwise 3x3 convolution of stride 2 and a 1x1 one, with batch norms, and ReLU
    but after the last. From a coarser map, a 1x1 convolution with a batch norm and a bilinear enlargement: by the power
    of two between the resolutions, then to the size of the map where it had an odd side.

    Shapes: maps (batch, rows, columns, dims[i]) of all resolutions, the finest first, to that of `target`.

    Source: HRNet (Wang et al. 2019, arXiv 1908.07919), with the depthwise halvings of HRFormer (Yuan et al. 2021, arXiv
    2110.09408).

    Args:
        dims: Channels of each resolution.
        target: The resolution that the result has.
    """

    def __init__(self, dims: Sequence[int], target: int, **dd: Any) -> None:
        super().__init__()
        self.target = target
        self.down = nn.ModuleList()
        for source, dim in enumerate(dims[:target]):
            convs = []
            for step in range(source + 1, target + 1):
                last = step == target
                convs += [
                    conv_norm(dim, 3, 2, act=False, groups=dim),
                    conv_norm(dims[target] if last else dim, act=not last),
                ]
            self.down.append(ConvsDownsample(dim, convs, **dd))
        self.up = nn.ModuleList(
            ConvsDownsample(dim, [conv_norm(dims[target], act=False)], **dd) for dim in dims[target + 1 :]
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        y = maps[self.target]
        height, width = y.shape[1], y.shape[2]
        for index, path in enumerate(self.down):
            y = y + path(maps[index])
        for index, path in enumerate(self.up):
            x = path(maps[self.target + 1 + index])
            scale = 2 << index
            x = resample_map(x, scale * x.shape[1], scale * x.shape[2], "bilinear")
            y = y + resample_map(x, height, width, "bilinear")
        return F.relu(y)


class Exchange(nn.Module):
    """Blocks at every resolution, then a `Merge` of all maps for each of them.

    Shapes: maps (batch, rows, columns, dims[i]) to the same.

    Args:
        dims: Channels of each resolution.
        branches: The blocks of each resolution.
    """

    def __init__(self, dims: Sequence[int], branches: Sequence[Sequence[nn.Module]], **dd: Any) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.ModuleList(blocks) for blocks in branches)
        # By the resolution's number, which outlives the removal of others.
        self.merges = nn.ModuleDict({str(target): Merge(dims, target, **dd) for target in range(len(dims))})
        self.grad_checkpointing = False

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        mixed = torch.jit.annotate(list[Tensor], [])
        for index, blocks in enumerate(self.branches):
            x = maps[index]
            for block in blocks:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
            mixed.append(x)
        merged = torch.jit.annotate(list[Tensor], [])
        for merge in self.merges.values():
            merged.append(merge(mixed))
        return merged


class ParallelStage(nn.Module):
    """New maps made from the coarsest one, and exchanges.

    Shapes: a list of maps to a longer one: the first `kept`, then one for each of `enter`, then what the exchanges make
    of them.

    Args:
        kept: How many of the maps go on.
        enter: Make the new maps from the last map.
        exchanges: As `Exchange` is made.
    """

    def __init__(self, kept: int, enter: Sequence[nn.Module], exchanges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.kept = kept
        self.enter = nn.ModuleList(enter)
        self.exchanges = nn.ModuleList(exchanges)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        last = maps[-1]
        maps = maps[: self.kept]
        for layer in self.enter:
            maps.append(layer(last))
        for exchange in self.exchanges:
            maps = exchange(maps)
        return maps


class Neck(nn.Module):
    """One map of all resolutions: each widened by a bottleneck and added to the halved sum of the finer ones.

    The halvings are 3x3 convolutions of stride 2, the last layer a 1x1 convolution; both have batch norms and ReLU.

    Shapes: maps (batch, rows, columns, dims[i]), the finest first, to (batch, rows, columns, widths[-1]) of the
    coarsest; `pyramid` gives the sum at every resolution.

    Source: the classification head of HRNet (Wang et al. 2019, arXiv 1908.07919).

    Args:
        dims: Channels of each resolution.
        widths: Channels that each resolution is widened to, and those of the result.
    """

    def __init__(self, dims: Sequence[int], widths: Sequence[int], **dd: Any) -> None:
        super().__init__()
        *widths, out_dim = widths
        self.widen = nn.ModuleList(Bottleneck(*each, **dd) for each in zip(dims, widths, strict=True))
        self.down = nn.ModuleList(
            ConvsDownsample(fine, [conv_norm(coarse, 3, 2)], **dd) for fine, coarse in pairwise(widths)
        )
        self.last = ConvsDownsample(widths[-1], [conv_norm(out_dim)], **dd)

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the sums (batch, rows, columns, widths[i]), the finest first; the coarsest has the last layer's."""
        wide = torch.jit.annotate(list[Tensor], [])
        for index, layer in enumerate(self.widen):
            wide.append(layer(maps[index]))
        sums = [wide[0]]
        for index, layer in enumerate(self.down):
            sums.append(layer(sums[-1]) + wide[index + 1])
        sums[-1] = self.last(sums[-1])
        return sums

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.pyramid(maps)[-1]

    @torch.jit.ignore
    def prune(self, count: int) -> None:
        """Drop what the sums of the `count` finest resolutions do not need."""
        if count < len(self.widen):
            self.widen, self.down, self.last = self.widen[:count], self.down[: count - 1], nn.Identity()


class Parallel(Backbone):
    """Stem, stages of maps at parallel resolutions, neck, average, classifier.

    The first stage has two resolutions, each later one adds a resolution of half the rows and columns. A stage is made
    of exchanges: blocks at every resolution, then sums over all of them (`Merge`). The maps of the last stage are the
    pyramid that `forward_intermediates` and `features_only` give; the neck makes one map of them for the classifier,
    or, with `neck_features`, a wider pyramid. An option that says "one per resolution" takes one for all or a list with
    an entry per resolution. A layer is given by name, by ``dict(name=..., options)`` or as a callable; the names are
    those of `visionmix.layers.by_name.layer_names`.

    Shapes: (batch, in_chans, height, width) to (batch, num_classes); `forward_features` gives the neck's map (batch,
    rows, columns, neck_dims[-1]). Any height and width of at least `patch_size`.

    Source: HRNet (Wang et al. 2019, arXiv 1908.07919), with blocks as in HRFormer (Yuan et al. 2021, arXiv 2110.09408)
    and the mixer left open.

    Args:
        img_size: Image size, one number or (height, width), at which size-tied tensors are built; any other is served
            by resampling them when called.
        patch_size: Pixels a cell of the finest map stands for, along each side.
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: How the neck's map becomes one vector: timm's pooling types, "" for none.
        embed_dims: Channels of each resolution, the finest first.
        num_exchanges: Exchanges of each stage.
        depths: Blocks of each resolution in one exchange, for each stage.
        num_heads: Heads, at each resolution, of mixers that have heads; None for heads about 32 channels wide.
        mixer: Token mixer: a name of `visionmix.list_mixers()` or ``dict(name=..., options)``. One per resolution.
        stem_dim: Channels of the stem's map.
        stem_layer: Makes the stem from (in_chans, stem_dim, patch_size).
        block_layer: Makes a block, as `visionmix.backbones.Block` is made. One per resolution.
        mlp_layer: Makes a feed-forward from the width; None for blocks without one. One per resolution.
        mlp_ratio: Hidden width of the feed-forwards over the width; None for the default of `mlp_layer`.
        act_layer: Activation of the feed-forwards: a name such as "relu", or a class; None for that of `mlp_layer`.
        norm_layer: Makes a norm over channels from the width. One per resolution.
        neck_dims: Channels that the neck widens each resolution to, then those of its result.
        neck_features: Whether `forward_intermediates` and `features_only` give the neck's sums, of these channels, in
            place of the maps that it reads; HRVMamba's published segmentation reads them.
        head_layer: Makes the classifier's head, as timm's `ClassifierHead` is made.
        layer_scale: Initial value of the blocks' learned scales, or None for none.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of what mixers return and inside feed-forwards.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Rate of stochastic depth at the last blocks; it grows linearly from 0.

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
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        num_exchanges: Sequence[int] = (1, 4, 2),
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] | None = None,
        mixer: MixerSpec | list[MixerSpec] = "softmax",
        stem_dim: int = 256,
        stem_layer: LayerSpec = BottleneckStem,
        block_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = Block,
        mlp_layer: _EachResolution = mlp,
        mlp_ratio: float | None = None,
        act_layer: LayerSpec = None,
        norm_layer: _EachResolution = _NORM,
        neck_dims: Sequence[int] = (128, 256, 512, 1024, 2048),
        neck_features: bool = False,
        head_layer: LayerSpec = _HEAD,
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
        check_lists(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, num_exchanges=num_exchanges, neck_dims=neck_dims
        )
        check_integers(1, in_chans=in_chans, embed_dims=embed_dims, num_heads=num_heads, neck_dims=neck_dims)
        check_integers(1, stem_dim=stem_dim, num_exchanges=num_exchanges)
        if not isinstance(neck_features, bool):
            raise TypeError(f"neck_features={neck_features!r} is no bool; give True or False")
        check_integers(0, num_classes=num_classes)
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        check_rates(**rates, drop_path_rate=drop_path_rate)
        count = len(embed_dims)
        num_heads = [heads_for(dim) for dim in embed_dims] if num_heads is None else num_heads
        if (
            not (len(num_heads) == count == len(neck_dims) - 1 == len(num_exchanges) + 1 == len(depths) + 1)
            or count < 2
        ):
            raise ValueError(
                f"embed_dims={tuple(embed_dims)}, num_heads={tuple(num_heads)}, neck_dims={tuple(neck_dims)}, "
                f"num_exchanges={tuple(num_exchanges)} and depths={tuple(depths)} do not fit; give two resolutions or "
                "more, one head count for each, one neck_dims more and one num_exchanges and depths less"
            )
        check_mixer(mixer, nested=2)

        def each(value: Any, option: str) -> list:
            return per_stage(value, count, option, "resolution")

        norms = [layer_maker("norm_layer", layer) for layer in each(norm_layer, "norm_layer")]
        mlps = [mlp_maker(layer, mlp_ratio, act_layer, proj_drop_rate) for layer in each(mlp_layer, "mlp_layer")]
        layers, mixers = each(block_layer, "block_layer"), each(mixer, "mixer")

        self.patch_size = patch_size
        self.stem = layer_maker("stem_layer", stem_layer)(in_chans, stem_dim, patch_size, **dd)
        grids = _grids(self.stem.grid_size(*image_sides(img_size, patch_size)), count)

        def branch(index: int, rates: Sequence[float]) -> list[nn.Module]:
            drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
            options = {"mlp_layer": mlps[index], "norm_layer": norms[index], "layer_scale": layer_scale, **dd}
            places = {"num_heads": num_heads[index], "grid_size": grids[index], "where": f" of resolution {index}"}
            return build_blocks(embed_dims[index], layers[index], mixers[index], rates, **places, **drops, **options)

        blocks = [depth for depth, times in zip(depths, num_exchanges, strict=True) for _ in range(times)]
        rates = iter(calculate_drop_path_rates(drop_path_rate, blocks, stagewise=True))
        self.stages = nn.ModuleList()
        for stage, times in enumerate(num_exchanges):
            dims = embed_dims[: stage + 2]
            if stage == 0:
                enter = [conv_norm(dims[0], 3), conv_norm(dims[1], 3, 2)]
            else:
                enter = [conv_norm(dims[-1], 3, 2)]
            enter = [ConvsDownsample(dims[-2] if stage else stem_dim, [conv], **dd) for conv in enter]
            exchanges = []
            for _ in range(times):
                drop_path = next(rates)
                exchanges.append(Exchange(dims, [branch(index, drop_path) for index in range(len(dims))], **dd))
            self.stages.append(ParallelStage(len(dims) - len(enter), enter, exchanges))
        self.neck, self.neck_features = Neck(embed_dims, neck_dims, **dd), neck_features
        merges = f"stages.{count - 2}.exchanges.{num_exchanges[-1] - 1}.merges"
        maps = [(f"{merges}.{index}", dim) for index, dim in enumerate(embed_dims)]
        if neck_features:
            names = ["neck.widen.0", *(f"neck.down.{index}" for index in range(count - 2)), "neck.last"]
            maps = list(zip(names, [*neck_dims[:-2], neck_dims[-1]], strict=True))
        self.feature_info = [
            {"num_chs": dim, "reduction": self.stem.stride << index, "module": name}
            for index, (name, dim) in enumerate(maps)
        ]
        head = layer_maker("head_layer", head_layer)
        self._finish(neck_dims[-1], head, patch_size, in_chans, num_classes, global_pool, drop_rate, **dd)

    @staticmethod
    def last_grid(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the neck's map of images of `size`, in a model built with `options`."""
        reduction = options.get("patch_size", 4) << (len(options["embed_dims"]) - 1)
        return -(-size[0] // reduction), -(-size[1] // reduction)

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> int | tuple[int, ...]:
        """Return what `features_only=True` gives unless told otherwise: every resolution's map."""
        check_lists(embed_dims=options["embed_dims"])
        return tuple(range(len(options["embed_dims"])))

    @torch.jit.ignore
    def _resize(self, height: int, width: int) -> tuple[int, int]:
        grids = _grids(self.stem.grid_size(height, width), len(self.feature_info))
        for stage in self.stages:
            for exchange in stage.exchanges:
                for blocks, grid_size in zip(exchange.branches, grids, strict=False):
                    set_grid_size(blocks, grid_size)
        return grids[-1]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass of every block for its activations."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            for exchange in stage.exchanges:
                exchange.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: the stem, each stage's new maps, blocks (each stage, if `coarse`), the neck.

        Blocks of all resolutions at the same depth are one group.
        """
        blocks = [
            (r"^stages\.(\d+)\.enter", (-1,)),
            (r"^stages\.(\d+)\.exchanges\.(\d+)\.branches\.\d+\.(\d+)", None),
            (r"^stages\.(\d+)\.exchanges\.(\d+)\.merges", (99998,)),
        ]
        return {
            "stem": r"^stem",
            "blocks": [*([(r"^stages\.(\d+)", None)] if coarse else blocks), (r"^neck", (99999,))],
        }

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps (batch, rows, columns, embed_dims[i]) of the last stage, the finest first."""
        maps = [self.stem(self.check(x))]
        for stage in self.stages:
            maps = stage(maps)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the neck's map (batch, rows, columns, neck_dims[-1]) of images (batch, in_chans, height, width)."""
        return self.neck(self.forward_maps(x))

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
        """Return the maps of the chosen resolutions, alone or with `forward_features`' result.

        They are the last stage's, or with `neck_features` the neck's. All resolutions need all stages, so `stop_early`
        changes nothing; nor does `norm`, since no norm follows.

        Args:
            x: Images (batch, in_chans, height, width).
            indices: Which resolutions: their numbers, how many of the last, or None for all.
            norm: Taken for the sake of other skeletons.
            stop_early: Taken for the sake of other skeletons.
            output_fmt: Axes of the maps: "NCHW", "NHWC", or "NLC" with cells in row-major order.
            intermediates_only: Whether to return the maps alone.
            return_prefix_tokens: Whether each map comes in a pair with the prefix tokens (batch, 0, channels).

        Raises:
            ValueError: `output_fmt` is none of the three.
        """
        check_output_format(output_fmt)
        take, _ = chosen_units(len(self.feature_info), indices, "resolutions", "indices")
        maps = self.forward_maps(x)
        numbers = [int(name) for name in self.stages[-1].exchanges[-1].merges]
        if self.neck_features:
            maps = self.neck.pyramid(maps)
        taken = []
        for number, cells in zip(numbers, maps, strict=True):
            if number in take:
                laid = laid_out(cells, output_fmt)
                taken.append((laid, cells.flatten(1, 2)[:, :0]) if return_prefix_tokens else laid)
        if intermediates_only:
            return taken
        return maps[-1] if self.neck_features else self.neck(maps), taken

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices=...)` does not need; return the numbers of the chosen resolutions.

        Without the head, a neck that only it needs goes, and with it the last sums of the other resolutions.
        """
        take, _ = chosen_units(len(self.feature_info), indices, "resolutions")
        if not prune_head:
            return take
        self.reset_classifier(0, "")
        needed = take
        if self.neck_features:
            needed = list(range(max(take) + 1))
            self.neck.prune(len(needed))
        else:
            self.neck = nn.Identity()
        merges = self.stages[-1].exchanges[-1].merges
        for name in [name for name in merges if int(name) not in needed]:
            del merges[name]
        return take


def _grids(finest: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Return the rows and columns of `count` maps, each half of the one before, rounded up."""
    grids = [finest]
    for _ in range(count - 1):
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    return grids
