"""Selective scans in chosen directions, windows among them: LocalMamba's mixer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionmix.layers import ChannelGate, ScanLayerNorm, ScanMixer, SelectiveScan2d
from visionmix.layers.order import chosen_orders
from visionmix.mixers.registry import register_mixer

_DIRECTIONS = ("raster", "raster_reversed", "window_7", "window_7_reversed")


@register_mixer("local_scan")
class LocalScan(ScanMixer):
    """A selective scan in each of several directions, each followed by the same channel gate, added.

    With ``x, z = W_in u`` and the scans S of `visionmix.layers.SelectiveScan2d`:

        y   = norm(sum over directions of gate(S(silu(depthwise3x3(x)))))
        out = W_out (y * silu(z))

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: LocalMamba (Huang et al. 2024, arXiv 2403.09338), the block of LocalVMamba.

    Args:
        dim: Channels.
        directions: Names of scan orders, as `visionmix.scans.order` takes them. The published models have four in each
            block, found by a search among rows, columns and windows of 2 and 7, forwards and backwards.
        order: A scan order or a set of directions that replaces `directions`, as other mixers take it; None for
            `directions`.
        norm_eps: Epsilon of the norms.
        published_inverse: Whether scans by columns are brought back to the map as the published code does it: by an
            inverse that is right for square maps, on which its weights were trained, and scrambles others.
        **options: `expand`, `d_state` and `dt_rank` of `visionmix.layers.ScanMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state` or `dt_rank` is below 1, or there is no such order.
    """

    def __init__(
        self,
        dim: int,
        *,
        directions: Sequence[str] = _DIRECTIONS,
        order: str | None = None,
        norm_eps: float = 1e-5,
        published_inverse: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        inner, dd = self.inner, self.factory_kwargs()
        names = chosen_orders(directions, order, published_inverse)
        self.count = len(names)
        self.conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, **dd)
        self.scan = SelectiveScan2d(inner, names, **self.sizes, merge="none", **dd)
        self.channel_gate = ChannelGate(inner, norm_eps=norm_eps, **dd)
        self.norm = ScanLayerNorm(inner, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        routes = self.scan(self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        gates, parts = self.channel_gate.gates(routes).unbind(3), routes.unbind(3)
        y = parts[0] * gates[0]
        for at in range(1, self.count):
            y = y.addcmul_(parts[at], gates[at])  # a graph drops a statement whose result nothing reads
        return self.proj(self.norm(y).to(z.dtype) * self.act(z))
