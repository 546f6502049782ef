"""ViT-Adapter: a pyramid beside a plain model, for detectors.

Source: Vision Transformer Adapter for Dense Predictions (Chen et al. 2022, arXiv 2205.08534), as PlainMamba's detectors
have it (arXiv 2403.17695).
"""

from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.ops import MultiScaleDeformableAttention
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.backbones import Plain
from visionmix.integrations.openmmlab import MODELS, Backbone, check_indices
from visionmix.layers.fan_out import draw_by_fan_out
from visionmix.reduction.sharing import Reduced

STRIDES = (8, 16, 32)  # of the adapter's tokens; the model's are of 16
STEPS = 4  # groups of blocks, between which model and adapter attend to each other


def _points(grids: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Return (1, cells, 1, 2), the middle of each cell as (x, y) in 0..1, of all grids of (rows, columns)."""
    found = []
    for rows, columns in grids:
        y, x = torch.meshgrid(
            (torch.arange(rows, device=device) + 0.5) / rows,
            (torch.arange(columns, device=device) + 0.5) / columns,
            indexing="ij",
        )
        found.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(found)[None, :, None]


def _tokens(x: Tensor) -> Tensor:
    """Return a map (batch, channels, rows, columns) as (batch, cells, channels)."""
    return x.flatten(2).transpose(1, 2)


def _maps(tokens: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    """Return (batch, cells, channels) as a map (batch, channels, rows, columns) for each grid."""
    parts = tokens.split([rows * columns for rows, columns in grids], 1)
    return [part.transpose(1, 2).unflatten(2, grid) for part, grid in zip(parts, grids, strict=True)]


class Prior(nn.Module):
    """Convolutions from images to maps of strides 4, 8, 16 and 32, the first of which is left out unless `finest`."""

    def __init__(self, dim: int, width: int, norm_cfg: dict, finest: bool) -> None:
        super().__init__()

        def layers(before: int, after: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            return [conv, build_norm_layer(norm_cfg, after)[1], nn.ReLU()]

        stem = [*layers(3, width, 2), *layers(width, width, 1), *layers(width, width, 1), nn.MaxPool2d(3, 2, 1)]
        widths = [width, 2 * width, 4 * width, 4 * width]
        steps = [layers(before, after, 2) for before, after in pairwise(widths)]
        self.steps = nn.ModuleList(nn.Sequential(*step) for step in (stem, *steps))
        self.projections = nn.ModuleList(nn.Conv2d(each, dim, 1) for each in (widths if finest else widths[1:]))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for step in self.steps:
            x = step(x)
            found.append(x)
        found = found[-len(self.projections) :]
        return [project(each) for project, each in zip(self.projections, found, strict=True)]


class Attention(nn.Module):
    """What the tokens `x` get from sampling the maps of other tokens, by deformable attention."""

    def __init__(self, dim: int, num_heads: int, num_points: int, levels: int) -> None:
        super().__init__()
        self.norm, self.norm_other = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiScaleDeformableAttention(dim, num_heads, levels, num_points, dropout=0.0, batch_first=True)

    def forward(
        self, x: Tensor, grids: list[tuple[int, int]], other: Tensor, other_grids: list[tuple[int, int]]
    ) -> Tensor:
        shapes = torch.tensor(other_grids, device=x.device)
        sizes = shapes.prod(1)
        return self.attn(
            self.norm(x),
            value=self.norm_other(other),
            identity=x.new_zeros(()),  # the layer adds it
            reference_points=_points(grids, x.device),
            spatial_shapes=shapes,
            level_start_index=sizes.cumsum(0) - sizes,
        )


class Extractor(nn.Module):
    """The adapter's tokens after attention to the model's, then a feed-forward with a convolution inside."""

    def __init__(self, dim: int, num_heads: int, num_points: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, num_points, 1)
        hidden = int(dim * mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, grids: list[tuple[int, int]], x: Tensor, grid: tuple[int, int]) -> Tensor:
        c = c + self.attention(c, grids, x, [grid])
        hidden = self.fc1(self.norm(c))
        hidden = torch.cat([_tokens(self.conv(each)) for each in _maps(hidden, grids)], 1)
        return c + self.drop_path(self.fc2(F.gelu(hidden)))


@MODELS.register_module()
class Adapter(Backbone):
    """A plain model and an adapter beside it: images to maps of strides 4, 8, 16 and 32, or some of them.

    Before each quarter of the model's blocks its cells attend to the adapter's maps of strides 8, 16 and 32, and after
    it those attend to the cells; three times after the last.

    Shapes: (batch, 3, height, width), both multiples of 32, to maps (batch, channels, rows, columns), one for each of
    `out_indices`. `channels` and `strides` are as in `Backbone`.

    Args:
        name: Plain model without prefix tokens and of stride 16, as `plainmamba_l1`.
        pretrained: As in `Backbone`.
        out_indices: Numbers of the maps that are returned: 0 of stride 4 to 3 of stride 32.
        drop_path_rate: Rate of stochastic depth, of the model's last block and of the adapter's feed-forwards.
        width: Channels of the adapter's first convolution.
        num_heads: Heads of its attention.
        num_points: Points that a head samples for a token, of each map.
        mlp_ratio: Hidden width of its feed-forwards over the model's width.
        norm_cfg: Norm of its convolutions and of the maps; None for SyncBN.
        init_cfg: As in `Backbone`.
        **options: Further arguments of `timm.create_model`.

    Raises:
        ValueError: as `Backbone` has it, the model is another one than `name` asks for, or a `reduction` is given.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str | PathLike = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        *,
        drop_path_rate: float = 0.0,
        width: int = 64,
        num_heads: int = 6,
        num_points: int = 4,
        mlp_ratio: float = 0.25,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
        **options: Any,
    ) -> None:
        more = {"drop_path_rate": drop_path_rate, "init_cfg": init_cfg, "one_stride": True}
        super().__init__(name, pretrained, **more, **options)
        model, dim = self.features.model, self.channels[-1]
        if isinstance(model, Reduced):
            given = f"reduction={options['reduction']!r}" if "reduction" in options else f"name={name!r}, reduced,"
            raise ValueError(
                f"{given} does not go with the adapter, which attends to every cell between the blocks; leave the "
                "reduction out, or take visionmix.Backbone"
            )
        if not isinstance(model, Plain) or model.has_prefix or self.strides[-1] != 16 or len(model.blocks) < STEPS:
            raise ValueError(
                f"name={name!r} is no plain model of stride 16, without prefix tokens and of {STEPS} blocks or more; "
                "give one, such as plainmamba_l1"
            )
        self.out_indices = check_indices(out_indices)
        if self.out_indices[-1] > len(STRIDES) or self.out_indices[0] < 0:
            raise ValueError(f"out_indices={out_indices!r} must be among 0, 1, 2 and 3")
        norm_cfg = norm_cfg or {"type": "SyncBN"}
        self.strides = [(4, *STRIDES)[index] for index in self.out_indices]
        self.channels = [dim] * len(self.strides)
        self.norms = nn.ModuleList(build_norm_layer(norm_cfg, dim)[1] for _ in self.channels)
        finest = 0 in self.out_indices
        self.prior = Prior(dim, width, norm_cfg, finest)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2) if finest else None
        self.level_embed = nn.Parameter(torch.randn(len(STRIDES), 1, dim))
        self.injectors = nn.ModuleList(Attention(dim, num_heads, num_points, len(STRIDES)) for _ in range(STEPS))
        self.gammas = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(STEPS))
        self.extractors = nn.ModuleList(
            Extractor(dim, num_heads, num_points, mlp_ratio, drop_path_rate) for _ in range(STEPS + 2)
        )
        for part in (self.prior, self.up, self.extractors):
            if part is not None:
                part.apply(_init)
        for part in self.modules():
            if isinstance(part, MultiScaleDeformableAttention):
                part.init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (batch, channels, rows, columns) of images (batch, 3, height, width)."""
        height, width = x.shape[-2:]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise ValueError(
                f"images of {height}x{width} pixels do not divide into cells of {STRIDES[-1]}; pad them, by "
                f"data_preprocessor=dict(pad_size_divisor={STRIDES[-1]})"
            )
        model = self.features.model
        grids = [(height // stride, width // stride) for stride in STRIDES]
        grid = grids[1]
        *finest, _, _, _ = coarse = self.prior(x)
        coarse = coarse[-len(STRIDES) :]
        c = torch.cat([_tokens(each) + level for each, level in zip(coarse, self.level_embed, strict=True)], 1)
        cells = model.pos_embed(model.stem(model.check(x))).flatten(1, 2)
        last = len(model.blocks)
        for step in range(STEPS):
            cells = cells + self.gammas[step] * self.injectors[step](cells, [grid], c, grids)
            cells = cells.unflatten(1, grid)
            for block in model.blocks[step * last // STEPS : (step + 1) * last // STEPS]:
                cells = block(cells)
            cells = cells.flatten(1, 2)
            c = self.extractors[step](c, grids, cells, grid)
        for extractor in self.extractors[STEPS:]:
            c = extractor(c, grids, cells, grid)
        maps = _maps(c, grids)
        if self.up is not None:
            maps = [self.up(maps[0]) + finest[0], *maps]
        maps = [maps[index - 4] for index in self.out_indices]
        (plain,) = _maps(cells, [grid])
        return tuple(
            norm(each + F.interpolate(plain, each.shape[-2:], mode="bilinear", align_corners=False))
            for norm, each in zip(self.norms, maps, strict=True)
        )


def _init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    else:
        draw_by_fan_out(layer)
