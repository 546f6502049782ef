"""Selective scans in heads, each with its own channels and its own routes: MHS-VM's mixer."""

import math
from typing import Any

import torch
import torch.fx
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.layers import ScanLayerNorm, SelectiveScan2d
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads
from visionmix.scans import direction_names

_ROUTES = 4


@torch.fx.wrap
def _fuse(routes: Tensor, threshold: float) -> Tensor:
    """Return the sum of the routes (batch, height, width, routes, dim) times how far they spread past a threshold."""
    spread = routes.var(dim=3).clamp(min=1e-24).sqrt()  # where all agree the root has no gradient
    level = (routes - routes.amin(dim=3, keepdim=True)).mean(dim=3)
    return routes.sum(dim=3) * torch.relu(spread / (level + 1e-5) - threshold)


@register_mixer("multi_head_scan")
class MultiHeadScan(nn.Module):
    """Heads of channels, each scanned along four routes and weighted by how much its routes differ.

    With ``x, z = W_in u``, heads ``x_i`` of ``W_x silu(depthwise3x3(x))`` and the scans S of
    `visionmix.layers.SelectiveScan2d`, one per route r:

        y_i = relu(std_r(S_r(x_i)) / (mean_r(S_r(x_i) - min_r S_r(x_i)) + 1e-5) - threshold) * sum_r S_r(x_i)
        out = norm(W_y norm(concat(y_i))) * silu(z)

    element by element, the deviation with the divisor n - 1.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: MHS-VM (Ji 2024, arXiv 2406.05992), its gated block.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        d_state: States per channel.
        threshold: Coefficient of variation above which an element counts.
        order: "mhs_vm" for the published routes (snakes, zigzags, spirals, rasters, one pair per head; a fifth head
            reads snakes again), or a scan order, whose four directions all heads then read.
        norm_eps: Epsilon of the norms.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `d_state` is below 1, or there is no such `order`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        d_state: int = 16,
        threshold: float = 0.0,
        order: str = "mhs_vm",
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        names = direction_names(order)
        names = names * math.ceil(_ROUTES * num_heads / len(names))
        width = dim // num_heads
        self.threshold = threshold
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.heads = nn.ModuleList(
            SelectiveScan2d(
                width,
                names[_ROUTES * head : _ROUTES * (head + 1)],
                dt_rank=math.ceil(width / 16),
                d_state=d_state,
                merge="none",
                **dd,
            )
            for head in range(num_heads)
        )
        self.head_norm = ScanLayerNorm(dim, eps=norm_eps, **dd)
        self.y_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.norm = LayerNorm(dim, eps=norm_eps, **dd)

    def scan(self, x: Tensor) -> Tensor:
        """Return the heads' outputs from (batch, height, width, dim), in the same shape."""
        parts = self.x_proj(x).unflatten(-1, (len(self.heads), -1))
        fused = [_fuse(head(parts[:, :, :, index]), self.threshold) for index, head in enumerate(self.heads)]
        return self.y_proj(self.head_norm(torch.cat(fused, dim=-1)).to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan(self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        return self.norm(y) * self.act(z)
