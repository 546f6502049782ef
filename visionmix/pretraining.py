"""RoMA's pre-training without labels, around the backbones of `visionmix.models.roma`.

Importing this module, which `visionmix` alone does not do, registers "roma_pretraining" with timm. It is no classifier,
and so not among the models. ``visionmix train pretrain/roma_arm_base.yaml`` trains it, and the backbones read what it
saves.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import LayerNorm, Mlp, build_sincos2d_pos_embed, trunc_normal_
from timm.models import checkpoint, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.order import scan_order, take
from visionmix.models.family import variant_of
from visionmix.models.roma import VARIANTS

_HEAD_DIM = 64
_PATTERNS = 256  # of the eight neighbours of a pixel, each darker than it or not


def patch_variety(images: Tensor, patch_size: int) -> Tensor:
    """Return how many local patterns each patch has, from 0 where all pixels show one to nearly 1.

    A pixel's pattern says which of its eight neighbours are as bright as it, or brighter (local binary patterns). With
    the shares p_i of the patterns i among a patch's pixels, its variety is ``1 - sum of p_i^2``.

    Shapes: (batch, channels, height, width) to (batch, rows, columns).

    Args:
        images: Images, whose sides are multiples of the patches'.
        patch_size: Side of a patch in pixels.
    """
    gray = images.float().mean(dim=1, keepdim=True)
    height, width = gray.shape[2:]
    around = F.pad(gray, [1, 1, 1, 1], mode="replicate")
    offsets = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    codes = torch.zeros_like(gray, dtype=torch.int64)
    for bit, (row, column) in enumerate(offsets):
        codes = codes + ((around[:, :, row : row + height, column : column + width] >= gray).long() << bit)
    codes = _patches(codes, patch_size)
    shares = torch.zeros(*codes.shape[:3], _PATTERNS, device=images.device)
    shares = shares.scatter_add_(3, codes, torch.full(codes.shape, patch_size**-2, device=images.device))
    return 1 - shares.square().sum(dim=3)


def choose_regions(variety: Tensor, sides: Sequence[int]) -> Tensor:
    """Return a square region of each image around the patch that has most variety, as row, column and side.

    It is the largest of `sides` with which some region around that patch has the image's mean variety or more, and the
    smallest where none has; among regions of this side, it is the one with most.

    Shapes: (batch, rows, columns) to int64 (batch, 3).

    Args:
        variety: That of each patch.
        sides: Sides in patches. Those that do not fit into the image are passed over.
    """
    rows, columns = variety.shape[1:]
    best = variety.flatten(1).argmax(dim=1)
    best_row, best_column = (best // columns).view(-1, 1, 1), (best % columns).view(-1, 1, 1)
    chosen = torch.stack([best_row.flatten(), best_column.flatten(), torch.ones_like(best)], dim=1)
    for count, side in enumerate(sorted(side for side in sides if side <= min(rows, columns))):
        means = F.avg_pool2d(variety.unsqueeze(1), side, stride=1).squeeze(1)
        first_row = torch.arange(means.shape[1], device=means.device).view(1, -1, 1)
        first_column = torch.arange(means.shape[2], device=means.device).view(1, 1, -1)
        around = (first_row <= best_row) & (first_row > best_row - side)
        around = around & (first_column <= best_column) & (first_column > best_column - side)
        value, place = means.masked_fill(~around, -math.inf).flatten(1).max(dim=1)
        region = torch.stack([place // means.shape[2], place % means.shape[2], torch.full_like(place, side)], dim=1)
        fits = (value >= variety.flatten(1).mean(dim=1)) if count else torch.ones_like(place, dtype=torch.bool)
        chosen = torch.where(fits.unsqueeze(1), region, chosen)
    return chosen


def rotate_regions(images: Tensor, regions: Tensor, angles: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Return the images with a region of each rotated about its centre, and which patches lie in it.

    Pixels that turn into a region come from around it, beyond the image's border from its reflection.

    Shapes: images (batch, channels, height, width) to the same, and bool (batch, rows, columns).

    Args:
        images: Images.
        regions: Row, column and side in patches of each image's region, (batch, 3).
        angles: Radians, (batch,).
        patch_size: Side of a patch in pixels.
    """
    height, width = images.shape[2:]
    top, left, side = (patch_size * part.view(-1, 1, 1) for part in regions.unbind(1))
    y = torch.arange(height, device=images.device).view(1, -1, 1)
    x = torch.arange(width, device=images.device).view(1, 1, -1)
    inside = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    down, right = y + 0.5 - (top + side / 2), x + 0.5 - (left + side / 2)  # from the centre
    cosine, sine = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
    source_y = top + side / 2 + cosine * down - sine * right
    source_x = left + side / 2 + sine * down + cosine * right
    grid = torch.stack([2 * source_x / width - 1, 2 * source_y / height - 1], dim=3).float()
    turned = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False).to(images.dtype)
    return torch.where(inside.unsqueeze(1), turned, images), inside[:, ::patch_size, ::patch_size]


def _patches(images: Tensor, patch_size: int) -> Tensor:
    """Return the pixels of each patch, (batch, rows, columns, channels * patch_size * patch_size)."""
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _image(patches: Tensor, patch_size: int) -> Tensor:
    """Return the images that `_patches` divides."""
    pixels = patches.unflatten(3, (-1, patch_size, patch_size)).permute(0, 3, 1, 4, 2, 5)
    return pixels.flatten(4, 5).flatten(2, 3)


def _positions(rows: int, columns: int, dim: int, like: Tensor) -> Tensor:
    """Return sines and cosines of the cells' positions, (rows * columns, dim)."""
    return build_sincos2d_pos_embed([rows, columns], dim, device=like.device, dtype=torch.float32).to(like.dtype)


class _DecoderBlock(nn.Module):
    """``q = q + attention(norm(q), norm(x))``, then ``q = q + mlp(norm(q))``: queries read tokens, each other not."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm1, self.norm_x, self.norm2 = (LayerNorm(dim, eps=1e-5, **dd) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, max(dim // _HEAD_DIM, 1), batch_first=True, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)

    def forward(self, q: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm_x(x)
        q = q + self.attention(self.norm1(q), x, x, attn_mask=hidden, need_weights=False)[0]
        return q + self.mlp(self.norm2(q))


class _Decoder(nn.Module):
    """From tokens after several blocks, in windows one after another, to the pixels of all windows but the first.

    Args:
        dim: Channels of the tokens.
        width: Channels of the decoder.
        depth: Number of its blocks; each reads the tokens of all layers through a projection of its own.
        pixels: Numbers that a patch has.
    """

    def __init__(self, dim: int, width: int, depth: int, pixels: int, **dd: Any) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width, **dd))
        self.norms = nn.ModuleList(LayerNorm(dim, eps=1e-5, **dd) for _ in range(depth))
        self.proj = nn.Linear(depth * dim, depth * width, **dd)
        self.blocks = nn.ModuleList(_DecoderBlock(width, **dd) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-5, **dd)
        self.predict = nn.Linear(width, pixels, **dd)
        trunc_normal_(self.query, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor], positions: Tensor, window: int) -> Tensor:
        number = torch.arange(positions.shape[0], device=positions.device) // window
        hidden = number >= number[window:, None]  # a window is predicted from those before it
        normed = [norm(x) for norm, x in zip(self.norms, features, strict=True)]
        tokens = self.proj(torch.cat(normed, dim=-1)).chunk(len(self.blocks), dim=-1)
        q = (self.query + positions[window:]).expand(tokens[0].shape[0], -1, -1)
        for block, x in zip(self.blocks, tokens, strict=True):
            q = block(q, x, hidden)
        return self.predict(self.norm(q))


class RoMAPretraining(nn.Module):
    """A backbone that learns, without labels, to predict each window of an image from the windows before it.

    The backbone's mixers read the patches in windows of `window` x `window` patches, row by row, in this direction
    alone. A decoder predicts the pixels of every window but the first, which attend to the tokens of all windows before
    theirs, taken after blocks from the middle of the backbone to its end. Two losses are added up:

    - "patches": the mean squared error of the pixels, which are normalised within each patch;
    - "regions": `region_weight` times the same for regions of `region` x `region` patches that hold no patch of the
      first window, averaged down to the size of one patch.

    In training, a square region of each image is rotated by up to `max_angle` before the backbone sees it, and a
    learned vector is added to its patches; the pixels to predict are those of the image as it was. The region is the
    one that `choose_regions` finds for `patch_variety`.

    Shapes: images (batch, in_chans, height, width) to the predicted, normalised pixels, in the same shape, with zeros
    in the first window. The sides are multiples of a window's and a region's.

    Source: RoMA (Wang et al. 2025, arXiv 2503.10392). Its published code differs. It chooses regions by the norm of the
    patterns' histogram, which is greatest for flat patches, fills their turned corners with zeros, and marks the
    patches on a diagonal alone. Its second loss pairs the pixels of each region in two different orders; without that,
    it would be the first loss over fewer patches.

    Args:
        backbone: Name of a model of `visionmix.models.roma`.
        num_classes: 0: there are no labels.
        img_size: Side of the images, or (height, width), for which the backbone is built.
        window: Side of a window in patches.
        region: Side of a region of the second loss, in patches.
        region_weight: Weight of the second loss.
        rotated_sides: Sides in patches that a rotated region may have.
        max_angle: Largest rotation in degrees, to either side.
        decoder_dim: Channels of the decoder, a multiple of 4; its heads are 64 channels wide.
        decoder_depth: Number of its blocks.
        **options: More options of the backbone.

    Raises:
        ValueError: there is no such backbone, `num_classes` is not 0, `img_size` cannot be divided into windows and
            regions, or `decoder_dim` does not fit.
    """

    def __init__(
        self,
        backbone: str = "roma_arm_base",
        num_classes: int = 0,
        img_size: int | tuple[int, int] = 192,
        window: int = 4,
        region: int = 6,
        region_weight: float = 0.1,
        rotated_sides: Sequence[int] = (2, 4, 6),
        max_angle: float = 45.0,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        if backbone not in VARIANTS:
            raise ValueError(f"backbone={backbone!r} has no pre-training here; give one of {sorted(VARIANTS)}")
        if num_classes != 0:
            raise ValueError(f"num_classes={num_classes}: pre-training has no classes; set data.labels=false")
        if decoder_dim % 4 or decoder_dim % max(decoder_dim // _HEAD_DIM, 1):
            raise ValueError(f"decoder_dim={decoder_dim} does not divide into heads; give a multiple of {_HEAD_DIM}")
        for name, value in (("window", window), ("region", region), ("decoder_depth", decoder_depth)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        layout = variant_of(backbone).layout
        mixer = {**layout.options["mixer"], "directions": [f"window_{window}"]}
        fixed = {"mixer": mixer, "prefix_tokens": None, "global_pool": "avg", "final_norm_layer": None}
        sizes = {"num_classes": 0, "img_size": img_size}
        self.backbone = layout.skeleton(**{**layout.options, **options, **sizes, **fixed})
        self.num_classes = 0
        self.pretrained_cfg = self.default_cfg = timm.get_pretrained_cfg(backbone).to_dict()
        self.patch_size, self.window, self.region = self.backbone.patch_size, window, region
        self.region_weight, self.rotated_sides, self.max_angle = region_weight, tuple(rotated_sides), max_angle
        rows, columns = self.backbone.grid_size
        self._check(rows * self.patch_size, columns * self.patch_size)
        weight = self.backbone.pos_embed.weight.requires_grad_(False)
        dim = weight.shape[-1]
        with torch.no_grad():
            weight.copy_(_positions(rows, columns, dim, weight).view_as(weight))
        self.rotated = nn.Parameter(trunc_normal_(torch.empty_like(weight[0, 0, 0]), std=0.02))
        depth = len(self.backbone.blocks)
        self.read_after = np.linspace(depth, depth / 2, decoder_depth).round().astype(int).tolist()[::-1]
        pixels = self.backbone.in_chans * self.patch_size**2
        dd = {"device": weight.device, "dtype": weight.dtype}
        self.decoder = _Decoder(dim, decoder_dim, decoder_depth, pixels, **dd)

    def _check(self, height: int, width: int) -> None:
        for name in ("window", "region"):
            side = self.patch_size * getattr(self, name)
            if height % side or width % side:
                raise ValueError(
                    f"images of {height} x {width} pixels do not divide into squares of {name}={getattr(self, name)} "
                    f"patches; give a size that is a multiple of {side}, or another {name}"
                )
        first = -(-self.window // self.region) * self.region * self.patch_size
        if height <= first and width <= first:
            raise ValueError(
                f"images of {height} x {width} pixels leave no region={self.region} beside the first "
                f"window={self.window}; give larger images, or smaller regions and windows"
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimisers should not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"rotated", "decoder.query"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass of the backbone's blocks for their activations."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return no layer: there are no classes."""
        return self.backbone.get_classifier()

    def forward(self, images: Tensor) -> Tensor:
        return self._predict(images, None)

    def forward_train(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction and the losses by name; regions are rotated in training mode alone."""
        seen, rotated = images, None
        if self.training:
            angles = math.radians(self.max_angle) * (2 * torch.rand(images.shape[0], device=images.device) - 1)
            regions = choose_regions(patch_variety(images, self.patch_size), self.rotated_sides)
            seen, rotated = rotate_regions(images, regions, angles, self.patch_size)
        predicted = self._predict(seen, rotated)
        return predicted, self._losses(predicted, images)

    def _predict(self, images: Tensor, rotated: Tensor | None) -> Tensor:
        self._check(*images.shape[2:])
        x = self.backbone.pos_embed(self.backbone.stem(self.backbone.check(images)))
        if rotated is not None:
            x = x + rotated.unsqueeze(3) * self.rotated
        rows, columns = x.shape[1:3]
        index, inverse = scan_order(f"window_{self.window}", rows, columns, x)
        after = []
        for block in self.backbone.blocks:
            x = checkpoint(block, x) if self.backbone.grad_checkpointing else block(x)
            after.append(x)
        features = [take(after[count - 1].flatten(1, 2), index) for count in self.read_after]
        positions = _positions(rows, columns, self.decoder.query.shape[2], self.decoder.query)[index]
        pixels = self.decoder(features, positions, self.window**2)
        pixels = take(F.pad(pixels, [0, 0, self.window**2, 0]), inverse)
        return _image(pixels.unflatten(1, (rows, columns)), self.patch_size)

    def _losses(self, predicted: Tensor, images: Tensor) -> dict[str, Tensor]:
        target = _patches(images.float(), self.patch_size)
        target = (target - target.mean(3, keepdim=True)) / (target.var(3, keepdim=True) + 1e-6).sqrt()
        counted = torch.ones_like(images[:1, :1], dtype=torch.float32)
        first = self.window * self.patch_size
        counted[:, :, :first, :first] = 0  # the first window is not predicted
        error = (predicted.float() - _image(target, self.patch_size)) * counted
        numbers = images.shape[0] * images.shape[1]
        patches = error.square().sum() / (counted.sum() * numbers)
        pooled = F.avg_pool2d(error, self.region)
        whole = -F.max_pool2d(-counted, self.region * self.patch_size)
        whole = whole.repeat_interleave(self.patch_size, dim=2).repeat_interleave(self.patch_size, dim=3)
        regions = (pooled.square() * whole).sum() / (whole.sum() * numbers)
        return {"patches": patches, "regions": self.region_weight * regions}


@register_model
def roma_pretraining(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **options: Any,
) -> nn.Module:
    """Return a `RoMAPretraining` (arXiv 2503.10392).

    Raises:
        ValueError: weights are asked for, which nobody published with a decoder of this form.
    """
    if pretrained:
        raise ValueError("pretrained=True: roma_pretraining has no published weights; its backbones have")
    return RoMAPretraining(**options)
