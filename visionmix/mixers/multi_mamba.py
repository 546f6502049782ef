"""Mamba along several scan orders at once: LocalVim's and RoMA's mixer."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from visionmix.layers import ChannelGate, GatedMixer, Grid, scaled_gate, unscaled
from visionmix.layers.order import chosen_orders, take, token_order
from visionmix.mixers.registry import register_mixer
from visionmix.scans.order_names import split_order

_DIRECTIONS = ("raster", "raster_reversed", "column", "column_reversed")


@register_mixer("multi_mamba")
class MultiMamba(GatedMixer):
    """Convolutions and selective scans of the tokens in several orders, with their own parameters and a common gate.

    With ``x, z = W_in u`` and, in order k of K, the convolution and scan S_k of `visionmix.layers.SelectiveScan1d`:

        y_k = S_k(x) * silu(z)
        out = W_out sum over k of gate(y_k)    (without channel_gate: W_out sum over k of y_k / K)

    where the gate is that of `visionmix.layers.ChannelGate`, one for all orders.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim). Tokens that are not cells (a class token) keep their places in every order, and the cells are
    read around them. Where an order pads the map, as windows do, a token of zeros enters the convolution.

    Source: LocalMamba (Huang et al. 2024, arXiv 2403.09338), the block of LocalVim; without `channel_gate`, RoMA (Wang
    et al. 2025, arXiv 2503.10392).

    Args:
        dim: Channels.
        directions: Names of scan orders, as `visionmix.scans.order` takes them; orders joined by "+" are refused. Those
            of LocalVim were found by a search among rows, columns and windows of 2 and 7, forwards and backwards.
        order: A scan order or a set of directions that replaces `directions`, as other mixers take it; None for
            `directions`.
        channel_gate: Whether every order's output has its channels gated before the sum, in place of the mean.
        norm_eps: Epsilon of the norm in the channel gate.
        published_inverse: Whether orders by columns are brought back to the map as LocalMamba's published code does it:
            by an inverse that is right for square maps, on which its weights were trained, and scrambles others.
        **options: `expand`, `d_state`, `dt_rank` and `d_conv` of `visionmix.layers.GatedMixer`.

    Raises:
        ValueError: `expand` leaves no channel, `d_state`, `dt_rank` or `d_conv` is below 1, or there is no such order,
            or it is joined of several.
    """

    has_gate: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        directions: Sequence[str] = _DIRECTIONS,
        order: str | None = None,
        channel_gate: bool = True,
        norm_eps: float = 1e-5,
        published_inverse: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.orders = list(chosen_orders(directions, order, published_inverse))
        for name in self.orders:
            if len(split_order(name)) > 1:
                raise ValueError(f"order={order!r} has {name!r}, which reads cells more than once; give another order")
        self.scans = nn.ModuleList(self.new_scan() for _ in self.orders)
        self.has_gate = channel_gate
        self.channel_gate = nn.Identity()
        if channel_gate:
            self.channel_gate = ChannelGate(self.inner, norm_eps=norm_eps, **self.factory_kwargs())

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        z = self.act(z)
        routes = torch.jit.annotate(list[Tensor], [])
        for number, scan in enumerate(self.scans):
            order, gate = self.orders[number], z
            if order == "raster":
                y = scan(x)
            else:
                index, inverse = token_order(order, grid.height, grid.width, grid.prefix_positions, x)
                y = take(scan(take(x, index)), inverse)
                if "unswapped" in order:  # the gate belongs to the step, whatever cell that is brought back to
                    gate = take(take(z, index), inverse)
            routes.append(y * gate)
        if self.has_gate:
            each = torch.stack(routes)
            # The gate looks at one order at a time: orders stand in the batch.
            y = self.channel_gate(each.flatten(0, 1).unsqueeze(1)).reshape(each.shape).sum(dim=0)
        else:
            y = torch.stack(routes).mean(dim=0)
        y, scale = scaled_gate(y, torch.ones_like(z[:, :, :1]))
        return unscaled(self.proj(y), scale)
