"""Selective scans of the frames of a pair, read in turns cell by cell: VFIMamba's mixer."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.layers import ScanLayerNorm, ScanMixer, SelectiveScan2d
from visionmix.layers.order import take, turns_order
from visionmix.mixers.registry import register_mixer
from visionmix.scans import direction_names
from visionmix.scans.order_names import split_order


@register_mixer("interleaved_scan")
class InterleavedScan(ScanMixer):
    """The 2D selective scan of several frames as one sequence: at each cell of an order, first every frame's token.

    With ``x, z = W_in u`` and the scans S of `visionmix.layers.SelectiveScan2d`, each direction with its own
    parameters:

        y   = norm(sum over directions of S(interleave(silu(depthwise3x3(x)))))
        out = W_out (y * silu(z))

    In two frames a and b, a direction that reads cells 1, 2, ... has the sequence a1, b1, a2, b2, ...; one whose name
    ends in "_reversed" reads all of that backwards, the last frame first. A padded step of an order is a token of zeros
    in each frame.

    Shapes: (batch, frames, height, width, dim) to the same, for every number of frames, height and width; a map
    (batch, height, width, dim) is a frame alone. The published code has both frames in the batch, the first ones in its
    first half: ``torch.stack(x.chunk(2), dim=1)``.

    Source: VFIMamba (Zhang et al. 2024, arXiv 2407.02315).

    Args:
        dim: Channels.
        order: A scan order, whose directions are the order, its transpose and the reverses of both, or one of
            `visionmix.scans.direction_sets()`.
        published_inverse: Whether the scans of every second direction are brought back to the frames as the published
            code does, whose weights need it: it takes their sequence for that of one frame behind the other.
        norm_eps: Epsilon of the norm after the scans.
        **options: `expand`, `d_state` and `dt_rank` of `visionmix.layers.ScanMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, there is no such `order`, or it joins
            several.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: str = "raster",
        published_inverse: bool = False,
        norm_eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        inner, dd = self.inner, self.factory_kwargs()
        self.directions = list(direction_names(order))
        for name in self.directions:
            if len(split_order(name)) > 1:
                raise ValueError(f"order={order!r} reads cells more than once; give an order that is not joined")
        self.published_inverse = published_inverse
        self.conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, **dd)
        self.scans = nn.ModuleList(SelectiveScan2d(inner, ("raster",), **self.sizes, **dd) for _ in self.directions)
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        u = x
        x, z = self.in_proj(_with_frames(x)).chunk(2, dim=-1)
        batch, frames, height, width, dim = x.shape
        x = self.act(self.conv(x.flatten(0, 1).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        # In turns: token ``cell * frames + frame``.
        tokens = x.reshape(batch, frames, height * width, dim).transpose(1, 2).reshape(batch, -1, dim)
        outputs = torch.jit.annotate(list[Tensor], [])
        for at, scan in enumerate(self.scans):
            behind = self.published_inverse and at % 2 == 1
            index, inverse = turns_order(self.directions[at], frames, height, width, behind, tokens)
            outputs.append(take(scan(take(tokens, index).unsqueeze(1)).squeeze(1), inverse))
        y = torch.stack(outputs).sum(dim=0)
        y = y.reshape(batch, height * width, frames, dim).transpose(1, 2).reshape(batch, frames, height, width, dim)
        return self.proj(self.norm(y).to(z.dtype) * self.act(z)).reshape(u.shape)


@torch.fx.wrap
def _with_frames(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 4 else x
